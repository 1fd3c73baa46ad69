"""What the gateway refuses is no evidence about the policy; what is too long for any gateway is the model's doing."""

from __future__ import annotations

import pytest

from services.rollout.metrics import Metrics
from services.rollout.tools import SandboxTools
from singlestream.clients.sandbox import SandboxRefused
from singlestream.config import RolloutConfig
from singlestream.contracts.sandbox import MAX_CODE_BYTES, ExecuteRequest, ExecuteResult
from tests.services.rollout.scripted import ScriptedSandbox


class RefusingSandbox(ScriptedSandbox):
    """Refuses every request with ``status``."""

    status = 404

    async def execute(self, request: ExecuteRequest, deadline_s: float) -> ExecuteResult:
        raise SandboxRefused(self.status, "the detail")


@pytest.mark.parametrize("status", [400, 404, 405, 413, 422])
async def test_a_refusal_is_a_fault_and_is_never_shown_to_the_model(status: int) -> None:
    sandbox, metrics = RefusingSandbox(), Metrics()
    sandbox.status = status
    tools = SandboxTools(sandbox, RolloutConfig(), metrics)
    with pytest.raises(SandboxRefused, match=str(status)):
        await tools.run("print(1)")
    assert tools.calls == []
    assert metrics.registry.get_sample_value("singlestream_rollout_tool_faults_total") == 1


async def test_code_that_is_too_long_is_told_to_the_model_and_not_sent() -> None:
    sandbox = ScriptedSandbox()
    tools = SandboxTools(sandbox, RolloutConfig(), Metrics())
    code = "é" * (MAX_CODE_BYTES // 2)
    assert await tools.run(code + "#") == f"Error: code has {MAX_CODE_BYTES + 1} bytes, the limit is {MAX_CODE_BYTES}"
    assert sandbox.ran == []
    await tools.run(code)
    assert sandbox.ran == [code]
    assert [call.status for call in tools.calls] == ["error", "ok"]
