"""A prompt's text and how to grade it, as Redis holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgpack
import numpy as np

from services.value_store import posterior
from services.value_store.table import SPLITS, Split, Table, new_record
from singlestream.errors import SinglestreamError
from singlestream.streams.ledger import prompt_id

Prior = tuple[float, float]
"""(α0, β0), each > 0."""


class Refused(SinglestreamError):
    """The request contradicts the run's state; the text says how. Nothing was changed."""


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


def prior_of(rewards: Sequence[float] | None, rho_min: float) -> Prior | None:
    """Prior from offline rewards, each in [0, 1]; None where none are given."""
    if rewards is None:
        return None
    alpha, beta = posterior.prior(sum(rewards), len(rewards), rho_min)
    return float(alpha), float(beta)


def plan_upsert(
    table: Table, prompts: Sequence[Prompt], priors: Sequence[Prior | None], now_s: float
) -> dict[str, bytes]:
    """Records of the table after an upsert: a prompt with visits keeps its value, one without takes the given prior.

    Args:
        table: not changed, but for new sources' numbers.
        prompts: of a repeated one its last text and split count, and its last prior that is not None.
        priors: one a prompt; None leaves the value of a known prompt, and is ½, ½ for a new one.
        now_s: Unix time.

    Raises:
        Refused: there would be more sources than a table can number.
    """
    records: dict[str, bytes] = {}
    try:
        for prompt in prompts:
            table.source_number(prompt.source)
    except ValueError as error:
        raise Refused(str(error)) from error
    last: dict[str, tuple[Prompt, Prior | None]] = {}
    for prompt, prior in zip(prompts, priors, strict=True):
        _, before = last.get(one := prompt.prompt_id, (None, None))
        last[one] = prompt, prior or before
    for one, (prompt, prior) in last.items():
        row = table.row(one)
        if row is not None and (table.visits[row] > 0 or prior is None):
            split = np.array([SPLITS.index(prompt.split)])
            records[one] = table.records(np.array([row]), split=split)[0]
        else:
            alpha, beta = prior or (0.5, 0.5)
            records[one] = new_record(alpha, beta, prompt.split, prompt.source, now_s)
    return records
