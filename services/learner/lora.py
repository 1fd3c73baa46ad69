"""Low-rank adapters (LoRA, arXiv 2106.09685), by peft: W + (alpha/rank)·B·A, where A and B alone train.

Engines, exports and everything else outside the learner see merged weights under the model's own names.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import nn

from singlestream.config import LearnerConfig
from singlestream.errors import ConfigError

BASE, A, B = ".base_layer", ".lora_A.default", ".lora_B.default"
"""What peft puts into the names of an adapted layer's parameters."""


def add_adapters(lm: nn.Module, settings: LearnerConfig) -> None:
    """Freeze the model and put adapters, without storage yet, on its linear layers.

    Args:
        lm: on the meta device.
        settings: the learner's.

    Raises:
        ConfigError: peft is not installed, or the targets name no linear layer, or an embedding.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("learner.lora_rank needs peft: pip install 'singlestream[lora]'") from error
    head = lm.get_output_embeddings()
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and module is not head]
    usable = {name.rpartition(".")[2] for name in linear}
    unusable = sorted(set(settings.lora_targets) - usable)
    if unusable or not settings.lora_targets:
        raise ConfigError(f"learner.lora_targets: {unusable} are none of the blocks' linear layers {sorted(usable)}")
    adapters = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.lora_targets)
    )
    inject_adapter_in_model(adapters, lm, low_cpu_mem_usage=True)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an A or a B."""
    return A in name or B in name


def initial(name: str, shape: torch.Size) -> torch.Tensor:
    """An adapter's values before training: B is 0; A is uniform in ±1/√in, the same on any number of ranks."""
    if B in name:
        return torch.zeros(shape)
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(number))


def merged(weight: Any, a: Any, b: Any, scaling: float) -> Any:
    """W + scaling·B·A: [out, in], [rank, in], [out, rank]; whole tensors, or all sharded alike over their rows."""
    return weight + scaling * (b @ a)
