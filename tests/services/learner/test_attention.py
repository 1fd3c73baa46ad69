from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from services.learner import attention
from services.learner.chunked_logprobs import score
from singlestream.errors import ConfigError

CPU = torch.device("cpu")


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([1, 2, 4]))
def test_values_and_gradients_are_those_of_each_trajectory_alone(lengths: list[int], key_heads: int) -> None:
    torch.manual_seed(sum(lengths))
    tokens = sum(lengths)
    query, key, value = (torch.randn(1, n, tokens, 8, requires_grad=True) for n in (4, key_heads, key_heads))
    weight = torch.randn(1, tokens, 4, 8)
    packed, _ = attention.attend(torch.nn.Module(), query, key, value, None, 0.3, rows=attention.rows_of(lengths, CPU))
    got = torch.autograd.grad((packed * weight).sum(), (query, key, value))
    parts = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        for q, k, v in zip(*(part.split(lengths, 2) for part in (query, key, value)), strict=True)
    ]
    alone = torch.cat(parts, 2).transpose(1, 2)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((alone * weight).sum(), (query, key, value))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("longest", [40, attention.WIDENED_TOKENS + 1])
def test_on_cpu_bf16_is_as_near_to_the_truth_as_its_rounding(longest: int) -> None:
    torch.manual_seed(longest)
    lengths = [longest, longest - 3, 5]
    parts = [torch.randn(1, heads, sum(lengths), 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    wide = [part.detach().double().requires_grad_() for part in parts]
    results = []
    for query, key, value in (parts, wide):
        rows = attention.rows_of(lengths, CPU)
        out, _ = attention.attend(torch.nn.Module(), query, key, value, None, rows=rows)
        assert out.dtype == query.dtype
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for mine, truth in zip(*results, strict=True):
        assert (mine.double() - truth).abs().mean() < 0.01 * truth.abs().mean()


def logprobs_and_gradients(model: Any, rows: list[torch.Tensor], packed: bool) -> tuple[torch.Tensor, ...]:
    """Log-probs of all tokens but each trajectory's first, and gradients of a weighted sum of them."""
    model.zero_grad()
    weights = torch.randn(sum(map(len, rows)), generator=torch.Generator().manual_seed(1))
    if packed:
        lengths = [len(row) for row in rows]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        inside = attention.rows_of(lengths, CPU)
        hidden = model.model(torch.cat(rows)[None], position_ids=positions, use_cache=False, rows=inside)
        states = hidden.last_hidden_state[0].split(lengths)
    else:
        states = [model.model(row[None], use_cache=False).last_hidden_state[0] for row in rows]
    scores = [
        score(state[:-1], model.lm_head.weight, row[1:], 1.0, 16)[0]
        for state, row in zip(states, rows, strict=True)
        if len(row) > 1
    ]
    logprobs = torch.cat(scores)
    (logprobs * weights[: len(logprobs)]).sum().backward()
    return logprobs.detach(), *(parameter.grad.clone() for parameter in model.parameters())


def test_packed_and_unpacked_give_the_same_logprobs_and_gradients() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = [torch.randint(0, 64, (length,)) for length in (17, 3, 30, 1, 29, 8, 22)]
    model.set_attn_implementation("sdpa")
    alone = logprobs_and_gradients(model, rows, packed=False)
    model.set_attn_implementation(attention.NAME)
    together = logprobs_and_gradients(model, rows, packed=True)
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_little_is_padded(lengths: list[int]) -> None:
    rows = attention.rows_of(lengths, CPU)
    slots = sum(count * width for count, width in rows.groups)
    assert slots == len(rows.tokens_G) <= sum(lengths) / attention.SHORTEST_SHARE
    assert torch.equal(rows.tokens_G[rows.slots_T], torch.arange(sum(lengths)))


def test_the_flash_kernel_takes_what_it_is_given_on_a_gpu() -> None:
    """Shapes and arguments alone, on tensors without storage: no GPU is asked for."""
    rows = attention.rows_of([5, 3], CPU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.empty(8, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
        out = attention._varlen(query, key, value, rows, 0.25)
    assert (out.shape, out.dtype) == ((8, 4, 16), torch.bfloat16)


def test_what_changes_the_scores_is_refused() -> None:
    part = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ConfigError, match="s_aux"):
        attention.attend(torch.nn.Module(), part, part, part, None, s_aux=torch.zeros(1))
