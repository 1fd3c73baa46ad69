"""A prompt's text and how to grade it, as Redis holds it."""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from services.value_store.table import Split
from singlestream.streams.ledger import prompt_id


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. Source and question make its id; the rest may be replaced.

    Args:
        question: the task's text, without any chat template.
        answer: ground truth for the grader.
        source: name of the data set it came from.
        environment: name of the environment that runs and grades it.
        split: ``train`` prompts are drawn for training; ``eval`` prompts only by jobs.
    """

    question: str
    answer: str
    source: str
    environment: str
    split: Split

    @property
    def prompt_id(self) -> str:
        """16 hex digits."""
        return prompt_id(self.source, self.question)

    def pack(self) -> bytes:
        """As it stands in Redis."""
        fields = (self.question, self.answer, self.source, self.environment, self.split)
        return bytes(msgpack.packb(fields, use_bin_type=True))

    @classmethod
    def unpack(cls, data: bytes) -> Prompt:
        """Inverse of `pack`."""
        return cls(*msgpack.unpackb(data, raw=False))
