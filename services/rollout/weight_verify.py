"""After an update: does the engine compute with the published weights? Runs inside the engine's worker.

A linear layer may hold its weights fused (q, k and v; gate and up) and packed for its kernel, so there is nothing to
compare byte by byte. Instead it is asked: a unit vector in gives a column of the weights out, exactly, whatever form
they are held in. A few columns of all layers cost what sampling one token costs; each holds a value of every row, so a
part that was not loaded, loaded elsewhere, or left in an older packing shows.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch

PROBED_COLUMNS = 8
"""Of each layer, side by side, somewhere else at each update."""
COMPARED_BYTES = 1 << 20
"""Other parameters up to this size are compared whole."""


def verify(model: torch.nn.Module, published: Mapping[str, torch.Tensor]) -> tuple[int, list[str]]:
    """Compare what a model computes with, and its small parameters, with a version's tensors.

    Args:
        model: vLLM's.
        published: name in the checkpoint → tensor.

    Returns:
        (tensors compared, names of those that were not: sharded over GPUs, or of a kind that is not known here).

    Raises:
        RuntimeError: names the first tensor that differs.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    fused: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    embeddings = [f"{p}.weight" for p, module in model.named_modules() if isinstance(module, VocabParallelEmbedding)]
    embeddings = [name for name in embeddings if name in published]
    compared: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, LinearBase | VocabParallelEmbedding) or getattr(module, "tp_size", 1) != 1:
            continue
        weights = [f"{part}.weight" for part in parts_of(path, fused)]
        if isinstance(module, VocabParallelEmbedding) and weights[0] not in published and len(embeddings) == 1:
            weights = embeddings  # a tied output layer has a packed copy of its own, but no tensor
        if any(name not in published for name in weights):
            continue
        _compare_columns(module, {name: published[name] for name in weights})
        compared.update(weights)
        biases = [f"{part}.bias" for part in parts_of(path, fused)]
        if getattr(module, "bias", None) is not None and all(name in published for name in biases):
            _expect(module.bias, torch.cat([published[name] for name in biases]), ", ".join(biases))
            compared.update(biases)
    for name, held in model.named_parameters():
        tensor = published.get(name)
        if tensor is not None and held.shape == tensor.shape and tensor.nbytes <= COMPARED_BYTES:
            _expect(held, tensor, name)
            compared.add(name)
    return len(compared), sorted(published.keys() - compared)


def parts_of(path: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Modules of the checkpoint that make up an engine's module, in the order of their rows.

    >>> parts_of("model.layers.0.mlp.gate_up_proj", {"gate_up_proj": ["gate_proj", "up_proj"]})
    ['model.layers.0.mlp.gate_proj', 'model.layers.0.mlp.up_proj']
    """
    above, _, last = path.rpartition(".")
    return [f"{above}.{part}" if above else part for part in fused.get(last, [last])]


def _compare_columns(module: Any, parts: Mapping[str, torch.Tensor]) -> None:
    """Have a layer multiply unit vectors, and compare with the parts' columns, one below the other.

    Weights that are also held unpacked are looked at too: an embedding looks its rows up there.
    """
    first = next(iter(parts.values()))
    width, probed = first.shape[1], min(PROBED_COLUMNS, first.shape[1])
    start = secrets.randbelow(width - probed + 1)
    held = next(module.parameters())
    units = torch.zeros(probed, width, dtype=first.dtype, device=held.device)
    units[torch.arange(probed), start + torch.arange(probed)] = 1
    with torch.no_grad():
        answers = [module.quant_method.apply(module, units, None).T]
    if held.dim() == 2 and held.shape[1] == width:
        answers.append(held[:, start : start + probed])
    for columns in answers:
        row = 0
        for name, tensor in parts.items():
            _expect(columns[row : row + tensor.shape[0]], tensor[:, start : start + probed], name)
            row += tensor.shape[0]


def _expect(held: torch.Tensor, published: torch.Tensor, name: str) -> None:
    told = held.detach().cpu()
    if told.shape != published.shape or not torch.equal(told, published.to(told.dtype)):
        raise RuntimeError(f"after the update, the engine's {name} differs from the published file")
