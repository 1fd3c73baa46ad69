"""An engine and a sandbox that follow a script: the edges of an episode."""

from __future__ import annotations

import asyncio
import re
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
    """Says the texts of a script, one a turn.

    Args:
        tokenizer: writes the texts as tokens.
        script: what to say; the last one is repeated. ``end`` is appended unless the text ends with a stop string.
        stall: (turn, tokens): in that turn stop after so many tokens until aborted; `stalled` is set then.
        versions: policy that samples each token, by its number within the turn; None means 0.1 throughout.
    """

    def __init__(
        self,
        tokenizer: Any,
        script: list[str],
        stall: tuple[int, int] | None = None,
        versions: Callable[[int], tuple[int, int]] | None = None,
    ) -> None:
        self.tokenizer, self.script, self.stall = tokenizer, script, stall
        self.stalled = asyncio.Event()
        self.gate = asyncio.Event()
        """No turn begins while it is not set."""
        self.gate.set()
        self.versions = versions or (lambda _: (0, 1))
        self.requests: list[GenerationRequest] = []
        self.held = (0, 1)
        self._aborts: dict[str, asyncio.Event] = {}

    async def generate(self, request_id: str, request: GenerationRequest) -> Generation:
        await self.gate.wait()
        self.requests.append(request)
        ids = self._turn(request)
        sampled: list[int] = []
        finish = "stop"
        for token in ids:
            if len(sampled) == request.max_tokens:
                finish = "length"
                break
            if self.stall == (self._place(request)[0], len(sampled)):
                self.stalled.set()
                await self._aborts.setdefault(request_id, asyncio.Event()).wait()
                finish = "aborted"
                break
            await asyncio.sleep(0)
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
        """What is still to be said after the prompt: where the script was left, it is continued."""
        turn, begun = self._place(request)
        text = self.script[min(turn, len(self.script) - 1)]
        assert text.startswith(begun)
        ends = any(text.endswith(stop) for stop in request.stop)
        return list(self.tokenizer.encode(text[len(begun) :])) + ([] if ends else [self.tokenizer.eos_token_id])

    def _place(self, request: GenerationRequest) -> tuple[int, str]:
        """Turn, and what has been said of it."""
        answer = self.tokenizer.decode(request.prompt_ids).rsplit("assistant\n", 1)[-1]
        parts = re.split(r"(?:\s*<interpreter>[^<]*(?:</code> without <code>)?</interpreter>\s*)+", answer)
        return len(parts) - 1, parts[-1]

    async def abort(self, request_id: str) -> None:
        self._aborts.setdefault(request_id, asyncio.Event()).set()

    async def swap_weights(self, update: dict[str, Any], version: int, lineage: int, clear_cache: bool) -> float:
        self.held = (version, lineage)
        return 0.0


class ScriptedSandbox:
    """Answers every snippet with its own text in capitals, with a fault as often as it is told to, or never."""

    def __init__(self, faults: int = 0, hangs: bool = False) -> None:
        self.faults, self.hangs = faults, hangs
        self.ran: list[str] = []
        self.asked = asyncio.Event()

    async def execute(self, request: ExecuteRequest, deadline_s: float) -> ExecuteResult:
        self.asked.set()
        if self.hangs:
            await asyncio.sleep(600)
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


def lease(
    number: int = 1, *, environment: str = "tiny_tool", progress: Progress | None = None, **changes: Any
) -> Lease:
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
