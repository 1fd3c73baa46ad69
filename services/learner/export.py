"""A checkpoint as a Hugging Face folder: ``python -m services.learner.export --config FILE OUT``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

from singlestream.config import Config, load_config
from singlestream.errors import CheckpointError, SinglestreamError

MAX_SHARD = "5GB"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")


def choose(folder: Path, name: str | None) -> Path:
    """The named checkpoint, or the newest good one. Raises `CheckpointError` that says what is wrong with each."""
    from services.learner.checkpoint_files import ARCHIVE, damage, named

    if name:
        candidates = [path for path in (folder / name, folder / ARCHIVE / name) if path.is_dir()] or [folder / name]
    else:
        candidates = named(folder)[::-1] + named(folder / ARCHIVE)[::-1]
    problems = []
    for path in candidates:
        problem = damage(path)
        if not problem:
            return path
        problems.append(problem)
    none = "no checkpoint yet; one is written every learner.checkpoint_every steps"
    raise CheckpointError(f"{folder}: {'; '.join(problems) or none}")


def _whole(model: Path, identity: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The model's weights: what the checkpoint holds, or the model's own with the checkpoint's adapters merged in."""
    from safetensors import safe_open

    from services.learner import lora
    from services.learner.identity import BASE_WEIGHTS, LORA_ALPHA, LORA_RANK, base_weights
    from services.learner.model import weight_files

    if not identity[LORA_RANK]:
        return tensors
    if base_weights(model) != identity[BASE_WEIGHTS]:
        raise CheckpointError(f"run.model: {model} holds other weights than those that the adapters were trained on")
    scaling = identity[LORA_ALPHA] / identity[LORA_RANK]
    adapters, whole = tensors, {}
    for name, path in weight_files(model).items():
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name).float()
        layer = name.removesuffix(".weight")
        if (a := adapters.get(f"{layer}{lora.A}.weight")) is not None:
            tensor = lora.merged(tensor, a, adapters[f"{layer}{lora.B}.weight"], scaling)
        whole[name] = tensor
    return whole


def export(
    config: Config, out: Path, name: str | None = None, dtype: Literal["bfloat16", "float32"] = "float32"
) -> Path:
    """Write the weights of a checkpoint beside the model's own configuration and tokenizer.

    Args:
        config: of the run.
        out: folder to make; it appears complete or not at all.
        name: checkpoint; None takes the newest good one.
        dtype: of the written weights.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: there is none that can be used, its adapters belong to another model, or ``out`` exists.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from huggingface_hub import save_torch_state_dict
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from services.learner.checkpoint_files import read_state
    from services.learner.checkpoints import MODEL

    if out.exists():
        raise CheckpointError(f"{out} exists: name another folder")
    checkpoint = choose(config.run.dir / "checkpoints", name)
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(stored[key].size) for key in stored if key.startswith(MODEL)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is meant
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    beside = out.parent / f".{out.name}.{os.getpid()}"
    beside.mkdir(parents=True)
    try:
        for file in config.run.model.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS):
                shutil.copy(file, beside)
        named = {key.removeprefix(MODEL): tensor for key, tensor in tensors.items()}
        whole = _whole(config.run.model, read_state(checkpoint)["identity"], named)
        weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in whole.items()}
        save_torch_state_dict(weights, beside, max_shard_size=MAX_SHARD, metadata={"format": "pt"})
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return checkpoint


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(prog="python -m services.learner.export", description=__doc__)
    parser.add_argument("--config", type=Path, help="the run's TOML file (default: SINGLESTREAM_CONFIG)")
    parser.add_argument("--checkpoint", help="its name (default: the newest good one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("out", type=Path, help="folder to make")
    options = parser.parse_args(argv)
    try:
        checkpoint = export(load_config(options.config), options.out, options.checkpoint, options.dtype)
    except SinglestreamError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: {checkpoint.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
