"""However a batch is cut, laid out and shared among ranks, a step does the same to the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.services.learner.recorded import ROOT, lease
from tests.services.learner.reference import reference_loss, reference_normalise
from tests.services.learner.steps_worker import AGE_BOUND, AGE_STEP, recorded_batch

pytestmark = pytest.mark.timeout(400)

BASE = {
    "lr": 3e-4, "compute_dtype": "float32", "attention": "padded", "micro_batch_tokens": 4096, "peak_tflops": 2.0,
}  # fmt: skip
ONE_RANK: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"attention": "packed"},
    "packed-4": {"attention": "packed", "micro_batch_tokens": 110},
    "padded-4": {"micro_batch_tokens": 130},
    "checkpointing": {"gradient_checkpointing": True, "logprob_chunk_tokens": 7, "peak_tflops": 0.0},
}
LORA = {"lora_rank": 4, "lora_alpha": 12.0, "lora_targets": ["q_proj", "down_proj"], "lr": 1e-3}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"attention": "packed"},
    "packed-4": {"attention": "packed", "micro_batch_tokens": 55},
    "padded-4": {"micro_batch_tokens": 65},
}
MICRO_BATCHES = {"packed-4": 4, "padded-4": 4}

Results = dict[str, dict[str, Any]]


def run_steps(model: Path, out: Path, ranks: int, runs: dict[str, dict[str, Any]]) -> Results:
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    settings = {name: {**BASE, **changes} for name, changes in runs.items()}
    command += ["tests.services.learner.steps_worker", str(model), str(out), json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    reply = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert reply.returncode == 0, reply.stderr
    results: Results = torch.load(out)
    return results


@pytest.fixture(scope="module")
def one_rank(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_steps(tiny, tmp_path_factory.mktemp("steps") / "one.pt", 1, {**ONE_RANK, "lora": LORA})


@pytest.fixture(scope="module")
def two_ranks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_steps(tiny, tmp_path_factory.mktemp("steps") / "two.pt", 2, {**TWO_RANKS, "lora": LORA})


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """A step moves a weight by about 3e-4; the tolerance is a thirtieth of that."""
    for mine, theirs in zip(one["facts"], other["facts"], strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-5
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        torch.testing.assert_close(tensor, other["tensors"][name], rtol=0, atol=1e-5)


def test_steps_change_the_weights(one_rank: Results, tiny: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = one_rank["padded"]["tensors"]
    assert after.keys() == before.keys() - {"lm_head.weight"}, "a tied head is published once"
    assert all((after[name] - before[name]).abs().max() > 5e-4 for name in after)
    assert 0 < one_rank["padded"]["facts"][0]["drift"] < 1
    assert one_rank["padded"]["facts"][0]["staleness_max"] == 4


def test_the_first_steps_loss_is_the_formulas(one_rank: Results, tiny: Path) -> None:
    """From the recorded trajectories alone: each scored by itself, segments beyond the bound masked, N before masks."""
    model, rng = AutoModelForCausalLM.from_pretrained(tiny), np.random.default_rng(5)
    logprobs, behaviour, masks, raw = [], [], [], []
    for trajectory in recorded_batch(rng):
        ids = torch.from_numpy(np.concatenate([segment.token_ids for segment in trajectory.segments])).long()
        with torch.no_grad():
            scores = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].double().numpy()
        mask, start = [], 0
        for segment in trajectory.segments:
            end = start + len(segment.token_ids)
            if segment.version is not None:
                logprobs.append(scores[start - 1 : end - 1])
                behaviour.append(segment.logprobs)
                mask += [AGE_STEP - segment.version <= AGE_BOUND] * (end - start)
            start = end
        masks.append(mask)
        raw.append(trajectory.reward - trajectory.v_hat)
    scaled = reference_normalise(raw, [sum(mask) for mask in masks], "token")
    advantages = np.repeat(scaled, [len(mask) for mask in masks])
    mask_A = np.concatenate(masks)
    assert 0 < mask_A.sum() < len(mask_A)
    loss = reference_loss(np.concatenate(logprobs), np.concatenate(behaviour), advantages, mask_A, len(mask_A))
    assert one_rank["padded"]["facts"][0]["loss"] == pytest.approx(loss, abs=1e-5)
    for wrong in (mask_A.sum(), np.roll(advantages, 1)):
        total, shifted = (wrong, advantages) if np.ndim(wrong) == 0 else (len(mask_A), wrong)
        other = reference_loss(np.concatenate(logprobs), np.concatenate(behaviour), shifted, mask_A, int(total))
        assert abs(other - loss) > 1e-4, "the loss can tell"


@pytest.mark.parametrize("name", list(ONE_RANK)[1:])
def test_the_layout_does_not_matter(one_rank: Results, name: str) -> None:
    assert one_rank[name]["micro_batches"] == pytest.approx(MICRO_BATCHES.get(name, 1), abs=1)
    same(one_rank["padded"], one_rank[name])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_the_number_of_ranks_does_not_matter(one_rank: Results, two_ranks: Results, name: str) -> None:
    assert two_ranks[name]["micro_batches"] == pytest.approx(MICRO_BATCHES.get(name, 1), abs=1), "of each rank"
    same(one_rank["padded"], two_ranks[name])


def test_the_mfu_by_hand(one_rank: Results, two_ranks: Results) -> None:
    layer = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128 + 2 * 32  # attention, MLP, norms, norms of queries and keys
    parameters = 128 * 128 + 2 * layer + 128
    for results, ranks in ((one_rank, 1), (two_ranks, 2)):
        for name, a_parameter in (("padded", 6), ("lora", 4)):
            # of attention: 2 layers of width 128, two products with as many keys as stand before, forward and backward
            operations = sum(t * (a_parameter * parameters + 6 * 2 * 128 * t) for t in results[name]["tokens"])
            assert results[name]["mfu"] == pytest.approx(operations / (0.5 * ranks * 2e12))
    assert one_rank["checkpointing"]["mfu"] is None, "no peak is set"


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_lease(one_rank: Results, two_ranks: Results) -> None:
    for results in (one_rank, two_ranks):
        for result in results.values():
            assert result["refused"] == (False, [lease(1)], True)


def test_adapters_alone_train_and_the_published_weights_are_merged(
    one_rank: Results, two_ranks: Results, tiny: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    for results in (one_rank, two_ranks):
        published, adapters = results["lora"]["tensors"], results["lora"]["adapters"]
        assert published.keys() == base.keys() - {"lm_head.weight"}, "engines see the model's own names"
        adapted = {name.removesuffix(".lora_A.default.weight") for name in adapters if ".lora_A." in name}
        assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "down_proj"}
        for name, tensor in published.items():
            layer = name.removesuffix(".weight")
            if layer not in adapted:
                assert torch.equal(tensor, base[name])
                continue
            a, b = adapters[f"{layer}.lora_A.default.weight"], adapters[f"{layer}.lora_B.default.weight"]
            torch.testing.assert_close(tensor, base[name] + 12.0 / 4 * (b @ a), rtol=0, atol=1e-6)
            assert (tensor - base[name]).abs().max() > 1e-4
    same(one_rank["lora"], two_ranks["lora"])
