"""What an episode asks of an engine, and what it gets back. Tokens in, tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from singlestream.contracts import Sampling
from singlestream.errors import SinglestreamError


class EngineDead(SinglestreamError):
    """The engine's process is gone, hung, or holds half-loaded weights: this replica must exit and be replaced."""


class RequestRefused(SinglestreamError):
    """The engine cannot do what a request asks for, such as a token that the model does not have."""


@dataclass(frozen=True)
class VersionSpan:
    """Tokens ``[start, end)`` of a generation were sampled by policy (version, lineage)."""

    version: int
    lineage: int
    start: int
    end: int


@dataclass(frozen=True)
class GenerationRequest:
    """One model turn to sample.

    Args:
        prompt_ids: every token before the turn, in order.
        sampling: how to sample.
        max_tokens: most tokens to sample; at least 1.
        stop: strings after which the turn ends; their tokens belong to the turn.
    """

    prompt_ids: list[int]
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A sampled turn, or the part of it that was sampled before an abort.

    Args:
        token_ids: [T] sampled tokens, the stop token included.
        logprobs: [T] natural log-probabilities under the sampling distribution.
        spans: which policy sampled which tokens; contiguous, covering [0, T).
        finish: ``stop`` (end of sequence or a stop string), ``length`` (``max_tokens``), or ``aborted``.
    """

    token_ids: list[int]
    logprobs: list[float]
    spans: list[VersionSpan]
    finish: Literal["stop", "length", "aborted"]


@dataclass(frozen=True)
class Part:
    """What was sampled since the last part of a streamed answer.

    Args:
        token_ids: new tokens.
        logprobs: their natural log-probabilities.
        finish: ``stop`` or ``length`` on the last part, None before.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish: str | None


class Engine(Protocol):
    """What an episode needs of an engine."""

    async def generate(self, request_id: str, request: GenerationRequest) -> Generation:
        """Sample one turn. Raises `EngineDead`."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a running `generate`, which then returns what it has with ``finish="aborted"``."""
        ...


def version_label(version: int, lineage: int) -> str:
    """How the engine carries a policy version: ``"version.lineage"``."""
    return f"{version}.{lineage}"


def parse_label(label: str) -> tuple[int, int]:
    """``(version, lineage)`` of a label. Raises ValueError for anything that `version_label` does not write."""
    version, lineage = label.split(".")
    return int(version), int(lineage)
