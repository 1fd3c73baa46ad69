"""No rank holds the whole model, at no moment of loading it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from services.learner.launch import free_port
from services.learner.tiny_model import make_tokenizer, tiny_config
from tests.services.learner.recorded import ROOT

WIDTH, LAYERS, RANKS = 512, 16, 2


@pytest.mark.timeout(400)
def test_two_ranks_load_a_model_that_neither_has_room_for(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(make_tokenizer(), LAYERS)
    config.hidden_size, config.intermediate_size, config.head_dim = WIDTH, 3 * WIDTH, WIDTH // 4
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")  # the values do not matter
    model.tie_weights()
    model.save_pretrained(tmp_path / "large")
    whole_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert whole_bytes > 2e8, "what one rank has besides does not matter"
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.services.learner.loading_worker", tiny, tmp_path / "large", whole_bytes]
    processes = [
        subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        replies = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(replies)
