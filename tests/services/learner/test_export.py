from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from redis import Redis
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.learner.export import choose, export
from singlestream.config import load_config
from singlestream.contracts import PolicyVersion, decode_as
from singlestream.errors import CheckpointError
from singlestream.streams import Keys
from tests.services.learner.recorded import Run, record


def test_an_export_loads_in_transformers_with_the_trained_weights(
    sync_redis: Redis, keys: Keys, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    record(sync_redis, keys, 16)
    run = make_run(run={"total_steps": 2})
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
        assert np.array_equal(parameters[entry.name].detach().numpy(), data)
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
