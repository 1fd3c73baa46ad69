from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from redis import Redis
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.learner.export import _whole, choose, export
from services.learner.identity import BASE_WEIGHTS, LORA_ALPHA, LORA_RANK
from singlestream.config import load_config
from singlestream.contracts import PolicyVersion, decode_as
from singlestream.errors import CheckpointError
from singlestream.streams import Keys
from tests.services.learner.recorded import ROOT, Run, record


def engine_logprobs(model: Path, tokens: list[int]) -> list[float]:
    """Of a real vLLM engine, in a process of its own."""
    command = [sys.executable, "-m", "tests.services.learner.vllm_worker", str(model), json.dumps(tokens)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    reply = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert reply.returncode == 0, reply.stderr
    line = next(line for line in reply.stdout.splitlines() if line.startswith("logprobs "))
    scores: list[float] = json.loads(line.removeprefix("logprobs "))
    return scores


@pytest.mark.timeout(300)
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_an_export_loads_in_transformers_and_in_vllm_with_the_trained_weights(
    sync_redis: Redis, keys: Keys, make_run: Callable[..., Run], tmp_path: Path, adapters: bool
) -> None:
    record(sync_redis, keys, 16)
    run = make_run(run={"total_steps": 2}, learner={"lora_rank": 4, "lr": 1e-2} if adapters else None)
    run.finish()
    out = tmp_path / "exported"
    checkpoint = export(load_config(run.config), out)
    assert checkpoint.name.startswith("step-00000002-")

    manifest = decode_as(PolicyVersion, sync_redis.xrevrange(keys.policy_versions, count=1)[0][1][b"m"]).manifest
    published = np.fromfile(manifest.path, np.uint8)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    parameters = dict(loaded.named_parameters())
    for entry in manifest.tensors:
        data = published[entry.offset : entry.offset + entry.nbytes].view(np.float32).reshape(entry.shape)
        exported = parameters[entry.name].detach().numpy()
        assert np.allclose(exported, data, rtol=0, atol=1e-6) if adapters else np.array_equal(exported, data)
    if adapters:
        tokens = list(range(20, 60))
        with torch.no_grad():
            scores = loaded(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        ours = scores.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
        assert engine_logprobs(out, tokens) == pytest.approx(ours, abs=1e-3)
    assert (
        AutoTokenizer.from_pretrained(out)("47*91=?").input_ids
        == AutoTokenizer.from_pretrained(run.model)("47*91=?").input_ids
    )

    with pytest.raises(CheckpointError, match="exists"):
        export(load_config(run.config), out)
    for path in (run.folder / "runs" / run.name / "checkpoints").iterdir():
        (path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="metadata is missing"):
        choose(run.folder / "runs" / run.name / "checkpoints", None)


def test_adapters_beside_another_model_are_a_clear_error(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="other weights than those that the adapters were trained on"):
        _whole(tiny, {LORA_RANK: 4, LORA_ALPHA: 8.0, BASE_WEIGHTS: "another's"}, {})
