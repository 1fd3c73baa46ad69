"""An engine and a sandbox that follow a script: the edges of an episode, for tests of its state machine and of the worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from services.rollout.generation import Generation, GenerationRequest, VersionSpan
from singlestream.contracts import Lease, Progress, Sampling
from singlestream.contracts.sandbox import ExecuteRequest, ExecuteResult, Usage
from singlestream.errors import SandboxError

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0)

Say = str | Callable[[GenerationRequest], str]


class ScriptedEngine:
    """Says the texts of a script, one a turn, a token every ``token_s``.

    Args:
        tokenizer: writes the texts as tokens.
        script: what to say; the last one is repeated. ``end`` is appended unless the text ends with a stop string.
        token_s: seconds a token.
        versions: policy that samples each token, by its number within the turn; None means 0.1 throughout.
    """

    def __init__(
        self,
        tokenizer: Any,
        script: list[str],
        token_s: float = 0.0,
        versions: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        self.tokenizer, self.script, self.token_s = tokenizer, script, token_s
        self.versions = versions or (lambda _: (0, 1))
        self.requests: list[GenerationRequest] = []
        self.held = (0, 1)
        self._aborted: set[str] = set()
        self._turns: dict[tuple[int, ...], int] = {}

    async def generate(self, request_id: str, request: GenerationRequest) -> Generation:
        self.requests.append(request)
        ids = self._turn(request)
        sampled: list[int] = []
        finish = "stop"
        for token in ids:
            if len(sampled) == request.max_tokens:
                finish = "length"
                break
            await asyncio.sleep(self.token_s)
            if request_id in self._aborted:
                finish = "aborted"
                break
            sampled.append(token)
        spans: list[VersionSpan] = []
        for place in range(len(sampled)):
            version, lineage = self.versions(place)
            if spans and (spans[-1].version, spans[-1].lineage) == (version, lineage):
                spans[-1] = VersionSpan(version, lineage, spans[-1].start, place + 1)
            else:
                spans.append(VersionSpan(version, lineage, place, place + 1))
        return Generation(sampled, [-0.5 - 0.001 * n for n in range(len(sampled))], spans, finish)  # type: ignore[arg-type]

    def _turn(self, request: GenerationRequest) -> list[int]:
        """What is still to be said after the prompt: the script is followed by what stands there, so it can be continued."""
        said = self.tokenizer.decode(request.prompt_ids)
        answer = said.rsplit("assistant\n", 1)[-1]
        turn = answer.count("</interpreter>")
        text = self.script[min(turn, len(self.script) - 1)]
        begun = answer.rsplit("</interpreter>", 1)[-1]
        assert text.startswith(begun)
        ends = any(text.endswith(stop) for stop in request.stop)
        return list(self.tokenizer.encode(text[len(begun) :])) + ([] if ends else [self.tokenizer.eos_token_id])

    async def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    async def swap_weights(self, update: dict[str, Any], version: int, lineage: int, clear_cache: bool) -> float:
        self.held = (version, lineage)
        return 0.0


class ScriptedSandbox:
    """Answers every snippet with its own text in capitals, or with a fault as often as it is told to."""

    def __init__(self, faults: int = 0, seconds: float = 0.0) -> None:
        self.faults, self.seconds = faults, seconds
        self.ran: list[str] = []

    async def execute(self, request: ExecuteRequest, deadline_s: float) -> ExecuteResult:
        await asyncio.sleep(self.seconds)
        if self.faults > 0:
            self.faults -= 1
            raise SandboxError("the gateway is away")
        self.ran.append(request.code)
        return ExecuteResult(
            status="ok",
            exit_code=0,
            signal=None,
            stdout=request.code.upper() + "\n",
            stderr="",
            stdout_truncated=False,
            stderr_truncated=False,
            stdout_bytes=len(request.code) + 1,
            stderr_bytes=0,
            error=None,
            usage=Usage(wall_s=0.0, cpu_s=0.0, max_rss_mb=1.0, queue_s=0.0),
            policy_version="scripted",
        )


def lease(number: int = 1, *, environment: str = "tiny_tool", progress: Progress | None = None, **changes: Any) -> Lease:
    """A training lease whose right answer is ``7``."""
    fields: dict[str, Any] = {
        "lease_id": f"train:0000abcd:{number}",
        "prompt_id": f"p{number}",
        "question": "3+4=?",
        "answer": "7",
        "environment": environment,
        "v_hat": 0.5,
        "version": 0,
        "sampling": SAMPLING,
        "progress": progress,
        "issued_at_s": time.time(),
    }
    return Lease(**(fields | changes))
