"""Which trajectories share a micro-batch, and which rank gets it: pure functions of lengths.

Every rank gets the same number of micro-batches, since each one's backward pass is a collective. A rank with nothing to
do gets an empty one (the caller runs a dummy of weight 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

Layout = Literal["packed", "padded"]
MicroBatch = list[int]
"""Indices into the lengths."""


def computed_tokens(lengths: Sequence[int], layout: Layout) -> int:
    """Tokens that the model computes for one micro-batch: their sum, or rows × the longest."""
    if not lengths:
        return 0
    return sum(lengths) if layout == "packed" else len(lengths) * max(lengths)


def cut(lengths: Sequence[int], budget_tokens: int, layout: Layout) -> list[MicroBatch]:
    """Cut trajectories into micro-batches of at most ``budget_tokens`` computed tokens; a longer one stands alone.

    ``padded`` joins neighbours in order of length, so that little is padded; ``packed`` fills bins, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    micro_batches: list[MicroBatch] = []
    for index in order:
        candidates = micro_batches if layout == "packed" else micro_batches[-1:]
        for micro in candidates:
            if computed_tokens([lengths[i] for i in (*micro, index)], layout) <= budget_tokens:
                micro.append(index)
                break
        else:
            micro_batches.append([index])
    return micro_batches


def plan(
    lengths: Sequence[int],
    ranks: int,
    budget_tokens: int,
    layout: Layout,
    cost: Callable[[int], float] = float,
) -> list[list[MicroBatch]]:
    """Micro-batches of every rank, the same number for each, with their costs balanced.

    Args:
        lengths: tokens of each trajectory.
        ranks: processes.
        budget_tokens: computed tokens of one micro-batch.
        layout: how a micro-batch is laid out.
        cost: floating-point operations of a row of so many tokens.

    Returns:
        For each rank its micro-batches; some may be empty.
    """
    micro_batches = cut(lengths, budget_tokens, layout)

    def weight(micro: MicroBatch) -> float:
        if layout == "packed":
            return sum(cost(lengths[i]) for i in micro)
        return len(micro) * cost(max((lengths[i] for i in micro), default=0))

    while len(micro_batches) % ranks:
        largest = max(micro_batches, key=lambda micro: (len(micro) > 1, weight(micro)))
        if len(largest) < 2:
            micro_batches += [[] for _ in range(-len(micro_batches) % ranks)]
            break
        micro_batches.remove(largest)
        micro_batches += [largest[0::2], largest[1::2]]
    if not micro_batches:
        micro_batches = [[] for _ in range(ranks)]

    share = len(micro_batches) // ranks
    shares: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for micro in sorted(micro_batches, key=lambda one: (-weight(one), one)):
        rank = min((r for r in range(ranks) if len(shares[r]) < share), key=lambda r: (loads[r], r))
        shares[rank].append(micro)
        loads[rank] += weight(micro)
    return shares
