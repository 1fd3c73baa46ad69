"""A recorded run: a random tiny model, a stream of trajectories, and the learner as a process on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from redis import Redis
from transformers import Qwen3ForCausalLM

from services.learner.tiny_model import make_tokenizer, tiny_config
from singlestream.contracts import EndOfRun, Message, Segment, ToolCall, Trajectory, encode
from singlestream.streams import Keys

ROOT = Path(__file__).parents[3]
EPOCH = "5f3a9c01"


def random_model(folder: Path, seed: int = 0) -> Path:
    """A tiny Qwen3 with random weights, as a Hugging Face folder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    Qwen3ForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lease(n: int) -> str:
    return f"train:{EPOCH}:{n}"


def prompt(n: int) -> str:
    return f"{n:016x}"


def trajectory(n: int, rng: np.random.Generator, version: int = 0, **changes: Any) -> Trajectory:
    """A trajectory of random tokens: prompt, first turn, observation, second turn by the next version or the same."""

    def generated(most: int, by: int) -> Segment:
        length = int(rng.integers(1, most))
        return Segment(
            kind="generated",
            token_ids=rng.integers(0, 103, length),
            logprobs=-rng.uniform(4.0, 5.5, length),
            version=by,
            lineage=1,
            replica="r1",
        )

    fields: dict[str, Any] = {
        "lease_id": lease(n),
        "prompt_id": prompt(n),
        "segments": [
            Segment(kind="prompt", token_ids=rng.integers(0, 103, int(rng.integers(3, 20)))),
            generated(16, version),
            Segment(kind="observation", token_ids=rng.integers(0, 103, int(rng.integers(1, 6)))),
            generated(8, version),
        ],
        "reward": float(rng.integers(0, 2)),
        "v_hat": float(rng.uniform(0.1, 0.9)),
        "end_reason": "stop",
        "turns": 2,
        "tool_calls": [ToolCall(turn=0, status="ok", wall_s=0.1)],
        "attempts": 1,
        "started_at_s": 0.0,
        "finished_at_s": 1.0,
    }
    return Trajectory(**{**fields, **changes})


def append(redis: Redis, keys: Keys, messages: list[Message]) -> None:
    """Put messages into the trajectory stream, the way a replica's script does."""
    for message in messages:
        number = getattr(message, "lease_id", "")
        redis.xadd(keys.trajectories, {"id": number, "m": encode(message)})


def record(
    redis: Redis, keys: Keys, trajectories: int, batch: int = 8, first: int = 1, last: int | None = None
) -> None:
    """A run's stream from lease ``first`` to ``last``, each sampled by the version that its batch trains.

    Where ``last`` is the run's last trajectory or None, the end marker follows.
    """
    rng = np.random.default_rng(0)
    whole: list[Message] = [trajectory(n, rng, version=(n - 1) // batch) for n in range(1, trajectories + 1)]
    last = last or trajectories
    append(redis, keys, whole[first - 1 : last])
    if last == trajectories:
        append(redis, keys, [EndOfRun(reason="recorded")])


@dataclass
class Run:
    """Settings of one learner run, and its processes."""

    folder: Path
    model: Path
    redis_url: str
    name: str
    port: int
    run: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    value_store: dict[str, Any] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def config(self) -> Path:
        run = {
            "name": self.name,
            "model": str(self.model),
            "redis_url": self.redis_url,
            "total_steps": 4,
            "train_batch_size": 8,
            "engine_dtype": "float32",
            "runs_dir": str(self.folder / "runs"),
            "weights_dir": str(self.folder / "weights"),
            **self.run,
        }
        learner = {
            "lr": 1e-3,
            "compute_dtype": "float32",
            "metrics_port": self.port,
            "checkpoint_every": 2,
            "micro_batch_tokens": 256,
            "deterministic": True,
            "wait_timeout_s": 60,
            **self.learner,
        }
        path = self.folder / f"{self.name}.toml"
        sections = (("run", run), ("learner", learner), ("value_store", self.value_store))
        lines = [
            f"[{title}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in body.items()) for title, body in sections
        ]
        path.write_text("\n".join(lines))
        return path

    def start(self, ranks: int = 1) -> subprocess.Popen[str]:
        """The learner under torchrun."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        command = [
            sys.executable,
            *(launcher if ranks > 1 else ["-m"]),
            "services.learner",
            "--config",
            str(self.config),
        ]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def finish(self, ranks: int = 1, deadline_s: float = 300.0) -> str:
        """Run the learner to its end; returns its log."""
        process = self.start(ranks)
        try:
            output, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, output
        return output

    def steps(self, file: str = "steps") -> list[dict[str, Any]]:
        """The records of ``steps.jsonl``, or of another of the run's files; one that is still being written is none."""
        path = self.folder / "runs" / self.name / f"{file}.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []
