"""However a batch is cut, laid out and shared among ranks, a step does the same to the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.services.learner.recorded import ROOT

BASE = {"lr": 1e-3, "compute_dtype": "float32", "attention": "padded", "micro_batch_tokens": 4096}


def run_steps(model: Path, out: Path, ranks: int, **settings: Any) -> dict[str, Any]:
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["tests.services.learner.steps_worker", str(model), str(out), json.dumps({**BASE, **settings})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    reply = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert reply.returncode == 0, reply.stderr
    result: dict[str, Any] = torch.load(out)
    return result


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, one padded micro-batch."""
    return run_steps(tiny, tmp_path_factory.mktemp("plain") / "out.pt", 1)


def same(one: dict[str, Any], other: dict[str, Any], skip: tuple[str, ...] = ("micro_batches",)) -> None:
    for mine, theirs in zip(one["facts"], other["facts"], strict=True):
        for name in mine.keys() - set(skip):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert one["tensors"].keys() == other["tensors"].keys()
    for name, tensor in one["tensors"].items():
        torch.testing.assert_close(tensor, other["tensors"][name], rtol=0, atol=1e-5)


def test_steps_change_the_weights(plain: dict[str, Any], tiny: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    assert plain["tensors"].keys() == before.keys() - {"lm_head.weight"}, "a tied head is published once"
    assert all((plain["tensors"][name] - before[name]).abs().max() > 1e-4 for name in plain["tensors"])
    assert plain["facts"][0]["micro_batches"] == 1
    assert 0 < plain["facts"][0]["drift"] < 1
    assert plain["facts"][0]["staleness_max"] == 4


@pytest.mark.parametrize(
    ("ranks", "settings", "micro_batches"),
    [
        (1, {"attention": "packed"}, 1),
        (1, {"attention": "packed", "micro_batch_tokens": 110}, 4),
        (1, {"micro_batch_tokens": 130}, 4),
        (1, {"gradient_checkpointing": True, "logprob_chunk_tokens": 7}, 1),
        (2, {}, 1),
        (2, {"attention": "packed", "micro_batch_tokens": 60}, 4),
    ],
    ids=["packed", "packed-4", "padded-4", "checkpointing", "2-ranks", "2-ranks-packed-4"],
)
def test_the_layout_does_not_matter(
    plain: dict[str, Any], tiny: Path, tmp_path: Path, ranks: int, settings: dict[str, Any], micro_batches: int
) -> None:
    result = run_steps(tiny, tmp_path / "out.pt", ranks, **settings)
    assert result["facts"][0]["micro_batches"] == pytest.approx(micro_batches, abs=1)
    same(plain, result, skip=("micro_batches",) if ranks == 1 else ("micro_batches", "logprob_sum"))
