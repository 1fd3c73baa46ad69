"""Causal attention inside each trajectory of a packed row, behind transformers' attention interface.

On CUDA one variable-length flash kernel serves the whole row. Elsewhere trajectories of similar length are laid side
by side and go through one SDPA call a group: what is padded is the attention alone, and of that at most a quarter.
Nowhere is there a mask of tokens × tokens.

Axes: T tokens of the packed row, G padded slots of a group, N query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from singlestream.errors import ConfigError

NAME = "trajectories"
"""What ``attn_implementation`` must be for models that are to use it."""
SHORTEST_SHARE = 0.75
"""A trajectory joins a group if it has this share of the longest one's tokens."""
CHANGES_SCORES = ("softcap", "s_aux", "position_bias", "sliding_window")
"""Of what attention layers of transformers pass on: a cap, sinks, biases, a window."""
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
WIDENED_TOKENS = 512
"""On CPU the bf16 kernel of SDPA takes 1.2 to 2.3 times as long as the fp32 one on rows of up to so many tokens."""


@dataclass(frozen=True)
class Rows:
    """Where the trajectories of one packed row lie.

    Args:
        starts: int32 [trajectories + 1], the first token of each, and T.
        longest: tokens of the longest.
        groups: (trajectories, their longest) of each group, in the order of ``slots_T``'s space.
        tokens_G: the token that each slot of the groups reads; padding reads its trajectory's last.
        slots_T: the slot of each token.
    """

    starts: torch.Tensor
    longest: int
    groups: tuple[tuple[int, int], ...]
    tokens_G: torch.Tensor
    slots_T: torch.Tensor


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[index] >= SHORTEST_SHARE * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def rows_of(lengths: Sequence[int], device: torch.device) -> Rows:
    """Describe a packed row. Args: tokens of each trajectory, at least one each; where the tensors shall live."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    starts[1:] = torch.tensor(lengths).cumsum(0)
    groups = _groups(lengths)
    tokens, slots = [], torch.empty(int(starts[-1]), dtype=torch.int64)
    filled = 0
    for group in groups:
        width = lengths[group[0]]
        within = torch.arange(width)
        for index in group:
            start, length = int(starts[index]), lengths[index]
            tokens.append(start + within.clamp(max=length - 1))
            slots[start : start + length] = filled + within[:length]
            filled += width
    return Rows(
        starts=starts.to(device, torch.int32),
        longest=max(lengths),
        groups=tuple((len(group), lengths[group[0]]) for group in groups),
        tokens_G=torch.cat(tokens).to(device),
        slots_T=slots.to(device),
    )


class _Spread(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """Tokens to slots. The slots that pad get no gradient: nothing behind them is kept."""

    @staticmethod
    def forward(ctx: Any, values_T: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return values_T.index_select(0, rows.tokens_G)

    @staticmethod
    def backward(ctx: Any, grad_G: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_G.index_select(0, ctx.rows.slots_T), None


class _Collect(torch.autograd.Function):  # type: ignore[misc]  # torch is not followed
    """Slots to tokens: `_Spread` backwards."""

    @staticmethod
    def forward(ctx: Any, values_G: torch.Tensor, rows: Rows) -> torch.Tensor:
        ctx.rows = rows
        return values_G.index_select(0, rows.slots_T)

    @staticmethod
    def backward(ctx: Any, grad_T: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad_G = grad_T.new_zeros((len(ctx.rows.tokens_G), *grad_T.shape[1:]))
        return grad_G.index_copy_(0, ctx.rows.slots_T, grad_T.contiguous()), None


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """SDPA over [trajectories, heads, tokens, D]."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16 and query.shape[2] <= WIDENED_TOKENS:
        query, key, value = query.float(), key.float(), value.float()
    attended = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return attended.to(dtype)


def _grouped(
    query_TND: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, rows: Rows, scale: float | None
) -> torch.Tensor:
    """SDPA group by group, [T, N, D]."""
    if len(rows.starts) == 2:
        query, key, value = (part[None].transpose(1, 2) for part in (query_TND, key_TKD, value_TKD))
        return _causal(query, key, value, scale)[0].transpose(0, 1)
    sizes = [count * width for count, width in rows.groups]
    spread = [_Spread.apply(part, rows).split(sizes) for part in (query_TND, key_TKD, value_TKD)]
    done = []
    for group, parts in zip(rows.groups, zip(*spread, strict=True), strict=True):
        query, key, value = (part.unflatten(0, group).transpose(1, 2) for part in parts)
        out = _causal(query, key, value, scale)
        done.append(out.transpose(1, 2).flatten(0, 1))
    result: torch.Tensor = _Collect.apply(torch.cat(done), rows)
    return result


def _varlen(
    query_TND: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, rows: Rows, scale: float | None
) -> torch.Tensor:
    """Flash attention over the whole row, [T, N, D]."""
    from torch.nn.attention.varlen import varlen_attn

    result: torch.Tensor = varlen_attn(
        query_TND, key_TKD, value_TKD, rows.starts, rows.starts, rows.longest, rows.longest,
        scale=scale, window_size=(-1, 0), enable_gqa=query_TND.shape[1] != key_TKD.shape[1],
    )  # fmt: skip
    return result


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    rows: Rows | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: the attention layer.
        query: [B, N, T, D]; ``key`` and ``value`` [B, K, T, D].
        key: see ``query``.
        value: see ``query``.
        attention_mask: always None: transformers makes no mask for an implementation that it does not know.
        scaling: of the scores; None means 1/√D.
        rows: where the trajectories of the one packed row lie; None: each of the B rows is one trajectory.
        others: what else the layer says; nothing in it may change the scores.

    Returns:
        ([B, T, N, D], None).

    Raises:
        ConfigError: the layer asks for more than causal attention.
    """
    if unknown := [name for name in CHANGES_SCORES if others.get(name) is not None]:
        raise ConfigError(f"run.model: its attention has {', '.join(unknown)}, which the learner does not compute")
    if rows is None:
        return _causal(query, key, value, scaling).transpose(1, 2), None
    query_TND, key_TKD, value_TKD = (part[0].transpose(0, 1) for part in (query, key, value))
    inside = _varlen if query.is_cuda and query.dtype in VARLEN_DTYPES else _grouped
    return inside(query_TND, key_TKD, value_TKD, rows, scaling)[None], None


AttentionInterface.register(NAME, attend)
