"""A Hugging Face causal language model, sharded with FSDP2, that returns log-probs of chosen tokens.

Axes: B rows, T tokens of a row, A action tokens of the micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from services.learner import architectures, attention, lora
from services.learner.chunked_logprobs import score
from singlestream.config import LearnerConfig
from singlestream.errors import ConfigError, WeightsError

PREFIX = "lm."
"""What `Scorer` puts before the names of the Hugging Face model's parameters."""


class Scorer(nn.Module):  # type: ignore[misc]  # torch is not followed
    """Log-probs of the action tokens, with no more than ``chunk_tokens`` rows of logits in memory at a time.

    Args:
        lm: a causal language model of transformers.
        temperature: of the sampling that is scored.
        chunk_tokens: rows of one chunk; where there are several, each is computed again in the backward pass.
    """

    lora_scaling = 0.0
    """How often B·A counts, where there are adapters."""
    alone = False
    """Whether one rank holds the whole model."""

    def __init__(self, lm: nn.Module, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        self.lm, self.temperature, self.chunk_tokens = lm, temperature, chunk_tokens
        self.plain = lm.config._attn_implementation == attention.NAME

    def forward(
        self,
        token_ids_BT: torch.Tensor,
        position_ids_BT: torch.Tensor | None,
        before_A: torch.Tensor,
        targets_A: torch.Tensor,
        rows: attention.Rows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score action tokens.

        Args:
            token_ids_BT: rows, padded on the right (causal attention never looks there), or one packed row.
            position_ids_BT: restarting at each trajectory of a packed row; None for padded rows.
            before_A: index into the flattened rows of the token before each action token.
            targets_A: the action tokens; at least one.
            rows: where the trajectories of a packed row lie; None for padded rows.

        Returns:
            (log-probs [A] in fp32, mean entropy in nats of a sample of them).
        """
        base = getattr(self.lm, self.lm.base_model_prefix)
        inside = {"rows": rows} if self.plain else {}
        output = base(input_ids=token_ids_BT, position_ids=position_ids_BT, use_cache=False, **inside)
        hidden_AH = output.last_hidden_state.flatten(0, 1)[before_A]
        head_VH = self.lm.get_output_embeddings().weight
        return score(hidden_AH, head_VH, targets_A, self.temperature, self.chunk_tokens)

    def keep_whole(self, keep: bool) -> None:
        """Keep parameters and gradients whole after the next backward pass, where one rank has them whole in any case.

        Then a step copies the masters once, and adds gradients up in place until its last pass, with ``keep`` False.
        Several ranks shard both again after each pass: their memory does not hold the model.
        """
        if self.alone:
            self.set_reshard_after_backward(not keep)
            self.set_requires_gradient_sync(not keep)

    def shard_again(self) -> None:
        """Let the masters be the parameters again after passes without gradient."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _build(folder: Path, settings: LearnerConfig) -> nn.Module:
    """The model without storage, its layers as `attention` has them where they are plain. Raises `ConfigError`."""
    try:
        config = AutoConfig.from_pretrained(folder)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.model: {folder}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"run.model: {folder}: {config.model_type} is no causal language model") from error
    text = config.get_text_config()
    architectures.refuse_changed_logits(text)
    architectures.remove_dropout(config)
    why = architectures.not_plain(text, kind)
    if why and settings.attention == "packed":
        raise ConfigError(f'run.model: {why}, so its trajectories cannot be packed: set learner.attention = "padded"')
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=None if why else attention.NAME
        )
    architectures.refuse_biased_head(lm)
    lm.tie_weights()
    return lm


def load_policy(
    folder: Path, settings: LearnerConfig, temperature: float, mesh: DeviceMesh, device: torch.device
) -> Scorer:
    """Shard a model over the mesh and fill each rank's part from the checkpoint's files.

    No rank ever holds the whole model: it is built without storage, sharded per block, and read by slices. Masters are
    fp32; ``settings.compute_dtype`` is that of the passes; gradients are reduced in fp32 and **summed** over ranks.

    Args:
        folder: Hugging Face folder with safetensors.
        settings: the learner's.
        temperature: of the scored sampling.
        mesh: one-dimensional, of all ranks.
        device: where the shards live.

    Raises:
        ConfigError: the folder or its architecture cannot be used.
        WeightsError: the files lack a parameter or have it in another shape.
    """
    lm = _build(folder, settings)
    if settings.lora_rank:
        lora.add_adapters(lm, settings)
    lm.train(settings.gradient_checkpointing)
    if settings.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    scorer = Scorer(lm, temperature, settings.logprob_chunk_tokens)
    scorer.lora_scaling = settings.lora_alpha / max(1, settings.lora_rank)
    _shard(scorer, settings, mesh)
    _materialise(scorer, device)
    _fill(scorer, folder)
    return scorer


def _shard(scorer: Scorer, settings: LearnerConfig, mesh: DeviceMesh) -> None:
    dtype = getattr(torch, settings.compute_dtype)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    blocks = set(scorer.lm._no_split_modules or ())
    scorer.alone = mesh.size() == 1
    for module in [one for one in scorer.modules() if type(one).__name__ in blocks]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=not scorer.alone)
    fully_shard(scorer, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    if scorer.alone:  # nothing to divide by, and a factor of 1 would cost a copy of the gradients
        return
    for module in scorer.modules():
        if isinstance(module, FSDPModule):  # not recursive: on the root alone it would scale wrongly, in silence
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _materialise(scorer: Scorer, device: torch.device) -> None:
    """Give the shards storage; buffers (rotary frequencies) were computed at construction and keep their values."""
    buffers = {name: buffer.clone() for name, buffer in scorer.named_buffers()}
    scorer.to_empty(device=device)
    for name, buffer in scorer.named_buffers():
        buffer.copy_(buffers[name])


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a Hugging Face folder holds which parameter. Raises `ConfigError` where there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ConfigError(f"run.model: {folder} holds no model.safetensors")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _fill(scorer: Scorer, folder: Path) -> None:
    files = weight_files(folder)
    opened: dict[Path, Any] = {}
    for name, parameter in parameters(scorer):
        if lora.is_adapter(name):
            _copy_rows(parameter, lora.initial(name, parameter.shape))
            continue
        if name not in files:
            raise WeightsError(f"{folder} has no parameter {name}, which its architecture needs")
        if files[name] not in opened:
            opened[files[name]] = safe_open(files[name], "pt")
        stored = opened[files[name]].get_slice(name)
        if list(stored.get_shape()) != list(parameter.shape):
            raise WeightsError(f"{folder}: {name} has shape {stored.get_shape()}, not {list(parameter.shape)}")
        _copy_rows(parameter, stored)


def _copy_rows(parameter: Any, stored: Any) -> None:
    """Fill this rank's shard from anything that can be sliced by rows."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    local = parameter.to_local()
    if local.numel():
        local.detach().copy_(stored[offset[0] : offset[0] + shape[0]])


def parameters(scorer: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name as the Hugging Face checkpoint spells it, sharded parameter), layer by layer; a tied tensor comes once.

    Adapters come beside the weight that they belong to, under names that no checkpoint of the model has.
    """
    for name, parameter in scorer.named_parameters():
        yield name.removeprefix(PREFIX).replace(lora.BASE, ""), parameter


def full_tensors(scorer: Scorer, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor in ``dtype``), one by one, adapters merged.

    Collective: every rank must run it to its end. Whoever keeps a tensor copies it to where it is wanted: one of the
    ranks does, and the others drop theirs.
    """
    named = dict(parameters(scorer))
    for name, parameter in named.items():
        if lora.is_adapter(name):
            continue
        whole = parameter.detach()
        layer = name.removesuffix(".weight")
        if (a := named.get(f"{layer}{lora.A}.weight")) is not None:
            whole = lora.merged(whole, a.detach(), named[f"{layer}{lora.B}.weight"].detach(), scorer.lora_scaling)
        whole = whole.to(dtype)
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        yield name, whole.contiguous()


def count_parameters(scorer: nn.Module) -> int:
    """Parameters of the whole model, tied ones once, adapters not counted."""
    return sum(parameter.numel() for name, parameter in parameters(scorer) if not lora.is_adapter(name))
