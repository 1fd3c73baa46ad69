"""What must not change within a run, however often it is resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from services.learner.model import parameters, weight_files
from services.learner.policy import Policy
from singlestream.config import Config

LORA_RANK, LORA_ALPHA, BASE_WEIGHTS = "learner.lora_rank", "learner.lora_alpha", "weights in run.model"
SAMPLE_BYTES = 2**20
"""Read of each end of a weight file to know it again."""


def identity(config: Config, policy: Policy) -> dict[str, Any]:
    """What must not change within a run, since it would change what the checkpoint's tensors or its stream mean.

    Setting, or what it stands for → its value, as ``state.json`` keeps it. Without adapters the model's own weights
    matter no more once there is a checkpoint, which holds them all.
    """
    shapes = [(name, list(parameter.shape)) for name, parameter in parameters(policy.model)]
    settings = config.learner
    found: dict[str, Any] = {
        "run.name": config.run.name,
        "run.temperature": config.run.temperature,
        "value_store.group_size": config.value_store.group_size,
        LORA_RANK: settings.lora_rank,
        "names and shapes of the model's parameters": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
    }
    if settings.lora_rank:
        found[LORA_ALPHA] = settings.lora_alpha
        found[BASE_WEIGHTS] = base_weights(config.run.model)
    return found


def base_weights(model: Path) -> str:
    """Digest of sizes and both ends of a model's weight files: enough to tell others, without reading them whole."""
    digest = hashlib.sha256()
    for path in sorted(set(weight_files(model).values())):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def changed(stored: dict[str, Any], now: dict[str, Any]) -> str:
    """Which parts of an `identity` differ, and how; empty where none does."""
    names = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    return "; ".join(f"{name} was {stored.get(name)}, is {now.get(name)}" for name in names)
