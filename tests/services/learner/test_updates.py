"""Several updates a batch, on a policy small enough to be worked out again in float64 numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.learner.loss import LossSettings, objective
from services.learner.policy import StepResult
from services.learner.updates import together, update
from tests.services.learner.test_policy import run_steps, same

RATE = 0.5
VOCABULARY = 5


@dataclass(frozen=True)
class Row:
    """One trajectory: the states it passed, what was sampled there, and the engine's word on it."""

    states: list[int]
    actions: list[int]
    behaviour: list[float]
    mask: list[bool]


@dataclass(frozen=True)
class Micro:
    """The rows of one update in one piece."""

    rows: Sequence[Row]

    def column(self, name: str) -> torch.Tensor:
        return torch.tensor([value for row in self.rows for value in getattr(row, name)], dtype=torch.float64)

    @property
    def behaviour_A(self) -> torch.Tensor:
        return self.column("behaviour")


class TablePolicy:
    """Softmax over a table of logits, one row a state, trained by plain gradient descent: `Policy`'s interface."""

    def __init__(self, table: np.ndarray, old: str) -> None:
        self.table = torch.tensor(table, requires_grad=True)
        self.settings: Any = SimpleNamespace(old=old)
        self.loss_settings = LossSettings(old=old, truncation=2.0 if old == "sg" else None)  # type: ignore[arg-type]

    def micro_batches(self, rows: Sequence[Row]) -> list[Micro]:
        return [Micro(rows)]

    def _score(self, micro: Micro) -> torch.Tensor:
        scores = torch.log_softmax(self.table, -1)
        return scores[micro.column("states").long(), micro.column("actions").long()]

    def logprobs(self, micros: Sequence[Micro]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self._score(micro) for micro in micros]

    def update(
        self, rows: Sequence[Row], advantages_N: np.ndarray, step: int, scored: Sequence[tuple[Micro, torch.Tensor]]
    ) -> StepResult:
        (micro, old_A), *rest = scored
        assert not rest
        tokens = [len(row.states) for row in rows]
        advantages_A = torch.tensor(np.repeat(advantages_N, tokens))
        mask_A = micro.column("mask").bool()
        result = objective(
            self._score(micro), micro.behaviour_A, advantages_A, mask_A, sum(tokens), self.loss_settings, old_A
        )
        (gradient,) = torch.autograd.grad(result.loss, self.table)
        with torch.no_grad():
            self.table -= RATE * gradient
        return StepResult(float(result.loss.detach()), 0.0, RATE, True, [], {"trained_tokens": float(mask_A.sum())})


def reference(
    table: np.ndarray, rows: Sequence[Row], advantages: Sequence[float], updates: int, old: str
) -> tuple[np.ndarray, list[float]]:
    """The same by loops: dL/dlogit of one token is −(1/N)·w·A·r·(1[a] − π) where no clip holds it back, else 0."""

    def log_softmax(state: int) -> np.ndarray:
        logits = table[state]
        return np.asarray(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))

    table = table.copy()
    before = [[log_softmax(s)[a] for s, a in zip(row.states, row.actions, strict=True)] for row in rows]
    losses = []
    for first in range(min(updates, len(rows))):
        part = range(first, len(rows), updates)
        total = sum(len(rows[i].states) for i in part)
        gradient, loss = np.zeros_like(table), 0.0
        for i in part:
            for t, (s, a) in enumerate(zip(rows[i].states, rows[i].actions, strict=True)):
                if not rows[i].mask[t]:
                    continue
                b, advantage = rows[i].behaviour[t], advantages[i]
                p = b if old == "behaviour" else before[i][t]
                shift = np.exp(p - b)
                w = 1.0 if old == "behaviour" else (min(shift, 2.0) if 1 / 8 <= shift <= 8 else 0.0)
                pi = log_softmax(s)
                r = np.exp(pi[a] - p)
                g = min(r * advantage, np.clip(r, 0.8, 1.28) * advantage)
                free = g == r * advantage
                if advantage < 0 and g < 10 * advantage:
                    g, free = 10 * advantage, False
                loss -= w * g / total
                if free:
                    gradient[s] -= w * advantage * r / total * (np.eye(VOCABULARY)[a] - np.exp(pi))
        table -= RATE * gradient
        losses.append(loss)
    return table, losses


TOKEN = st.tuples(st.integers(0, 3), st.integers(0, VOCABULARY - 1), st.floats(-5, -0.05), st.booleans())
ROWS = st.lists(st.tuples(st.lists(TOKEN, min_size=1, max_size=4), st.floats(-3, 3)), min_size=1, max_size=7)


@settings(max_examples=60)
@given(ROWS, st.integers(2, 4), st.sampled_from(["sg", "behaviour"]), st.integers(0, 2**32 - 1))
def test_against_the_reference(
    drawn: list[tuple[list[tuple[int, int, float, bool]], float]], updates: int, old: str, seed: int
) -> None:
    table = np.random.default_rng(seed).normal(size=(4, VOCABULARY))
    rows = [Row(*(list(column) for column in zip(*tokens, strict=True))) for tokens, _ in drawn]
    advantages = [advantage for _, advantage in drawn]
    policy: Any = TablePolicy(table, old)
    result = update(policy, rows, np.array(advantages), 0, updates)  # type: ignore[arg-type]
    expected, losses = reference(table, rows, advantages, updates, old)
    np.testing.assert_allclose(policy.table.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-9, abs=1e-12)


def test_updates_of_one_batch_together() -> None:
    one = StepResult(1.0, 2.0, 0.1, True, [], {"trained_tokens": 30.0, "ess": 1.0, "logprob_shift_max": 0.5})
    other = StepResult(3.0, 4.0, 0.1, False, ["train:5f3a9c01:4"], one.means | {"trained_tokens": 10.0, "ess": 0.6})
    result = together([one, other])
    assert (result.loss, result.grad_norm, result.applied, result.bad_leases) == (2.0, 3.0, False, ["train:5f3a9c01:4"])
    assert result.means == pytest.approx({"trained_tokens": 40.0, "ess": 0.9, "logprob_shift_max": 0.5})


@pytest.mark.timeout(700)
def test_neither_layout_nor_ranks_matter_with_several_updates(tiny: Path, tmp_path: Path) -> None:
    runs = {
        "padded": {"updates_per_batch": 3},
        "packed": {"updates_per_batch": 3, "attention": "packed", "micro_batch_tokens": 110},
    }
    one = run_steps(tiny, tmp_path / "one.pt", 1, runs)
    two = run_steps(tiny, tmp_path / "two.pt", 2, runs)
    assert one["padded"]["facts"][0]["approx_kl"] > 0, "later updates are off their old policy"
    for other in (one["packed"], two["padded"], two["packed"]):
        same(one["padded"], other)
