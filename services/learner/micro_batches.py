"""Samples as the tensors of one micro-batch.

Axes: B rows, T tokens of a row, A action tokens of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.learner.attention import Rows, rows_of
from services.learner.packing import Layout
from services.learner.samples import Sample


@dataclass(frozen=True)
class MicroBatch:
    """What `Scorer` takes, and what the loss needs beside it.

    Args:
        token_ids_BT: rows padded on the right with 0, or one packed row.
        position_ids_BT: for a packed row; None for padded rows.
        before_A: index into the flattened rows of the token before each action token.
        targets_A: the action tokens.
        behaviour_A: the engine's log-probs of them.
        mask_A: whether each trains.
        row_A: which of ``samples`` each belongs to.
        staleness_A: optimizer updates since each was sampled.
        samples: indices into the batch; none for a dummy.
        rows: where each trajectory lies in a packed row; None for padded rows.
    """

    token_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor | None
    before_A: torch.Tensor
    targets_A: torch.Tensor
    behaviour_A: torch.Tensor
    mask_A: torch.Tensor
    row_A: torch.Tensor
    staleness_A: torch.Tensor
    samples: list[int]
    rows: Rows | None = None


def lay_out(batch: Sequence[Sample], chosen: list[int], layout: Layout, device: torch.device) -> MicroBatch:
    """Make the tensors of the chosen samples; where they have no action token, a dummy whose one is masked."""
    if not any(batch[index].action_tokens for index in chosen):
        return _dummy(device)
    rows = [batch[index] for index in chosen]
    lengths = [row.tokens for row in rows]
    if layout == "packed":
        token_ids_BT = np.concatenate([row.token_ids_T for row in rows])[None]
        packed: Rows | None = rows_of(lengths, device)
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None]).to(device)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    else:
        width = max(lengths)
        token_ids_BT = np.zeros((len(rows), width), np.int64)
        for place, row in enumerate(rows):
            token_ids_BT[place, : row.tokens] = row.token_ids_T
        positions, packed = None, None
        starts = np.arange(len(rows)) * width
    actions = [np.flatnonzero(row.action_T) for row in rows]

    def gather(name: str) -> torch.Tensor:
        values = np.concatenate([getattr(row, name)[action] for row, action in zip(rows, actions, strict=True)])
        return torch.from_numpy(values).to(device)

    before_A = np.concatenate([start + action - 1 for start, action in zip(starts, actions, strict=True)])
    row_A = np.repeat(np.arange(len(rows)), [len(action) for action in actions])
    return MicroBatch(
        token_ids_BT=torch.from_numpy(token_ids_BT).to(device),
        position_ids_BT=positions,
        before_A=torch.from_numpy(before_A.astype(np.int64)).to(device),
        targets_A=gather("token_ids_T"),
        behaviour_A=gather("behaviour_T"),
        mask_A=gather("mask_T"),
        row_A=torch.from_numpy(row_A).to(device),
        staleness_A=gather("staleness_T"),
        samples=chosen,
        rows=packed,
    )


def _dummy(device: torch.device) -> MicroBatch:
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return MicroBatch(
        token_ids_BT=torch.zeros((1, 2), dtype=torch.int64, device=device),
        position_ids_BT=None,
        before_A=zero,
        targets_A=zero,
        behaviour_A=torch.zeros(1, device=device),
        mask_A=torch.zeros(1, dtype=torch.bool, device=device),
        row_A=zero,
        staleness_A=zero,
        samples=[],
    )
