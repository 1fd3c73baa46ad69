"""Check a weight manifest and its bytes before the engine is touched: a half-loaded engine cannot be mended."""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singlestream.contracts import TensorEntry, WeightManifest
from singlestream.errors import ConfigError, WeightsError
from singlestream.weight_delta import ITEM_BYTES

CHECK_THREADS = 4
"""Checksums release the interpreter's lock: about a gigabyte a second for each core that is free."""
TIED_OUTPUT = "lm_head.weight"
"""May be absent, or present as well, where the input embedding is used for the output too."""


@dataclass(frozen=True)
class ModelTensors:
    """Names and shapes that a full set of weights of one model has.

    Args:
        shapes: parameter name → shape, as the model folder's checkpoint spells them.
        tied: whether the output layer is the input embedding.
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: bool


def model_tensors(folder: Path) -> ModelTensors:
    """Read the names and shapes from a Hugging Face folder's safetensors headers.

    Raises:
        ConfigError: the folder has no config.json or no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").exists():
        raise ConfigError(f"run.model = {folder}: no config.json with *.safetensors in it")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    tied = bool(json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False))
    return ModelTensors(shapes, tied)


def check_manifest(manifest: WeightManifest, model: ModelTensors) -> None:
    """Refuse a manifest that would not load whole layers of exactly this model.

    Raises:
        WeightsError: a tensor is missing, unknown, doubled, misshapen, misplaced or of the wrong size. Names the first.
    """
    names = [entry.name for entry in manifest.tensors]
    optional = {TIED_OUTPUT} if model.tied else set()
    if len(set(names)) != len(names):
        raise WeightsError(f"{manifest.path}: a tensor is listed twice")
    if missing := set(model.shapes) - set(names) - optional:
        raise WeightsError(f"{manifest.path}: {len(missing)} tensors are missing, among them {min(missing)}")
    if unknown := set(names) - set(model.shapes) - optional:
        raise WeightsError(f"{manifest.path}: the model has no tensor {min(unknown)}")
    for entry in manifest.tensors:
        expected = model.shapes.get(entry.name)
        if expected is not None and tuple(entry.shape) != expected:
            raise WeightsError(f"{manifest.path}: {entry.name} has shape {entry.shape}, the model {list(expected)}")
        item_bytes = ITEM_BYTES[entry.dtype]
        if entry.nbytes != math.prod(entry.shape) * item_bytes or entry.offset % item_bytes:
            raise WeightsError(f"{manifest.path}: {entry.name}: size or offset does not fit its shape and type")


@dataclass(frozen=True)
class OpenWeights:
    """A weight file held open: it can be mapped by its path here even after it was unlinked."""

    fd: int
    manifest: WeightManifest

    @property
    def update(self) -> dict[str, Any]:
        """What `weight_transfer.MappedFileUpdate` takes."""
        tensors = [(entry.name, entry.dtype, entry.shape, entry.offset) for entry in self.manifest.tensors]
        return {
            "path": f"/proc/{os.getpid()}/fd/{self.fd}",
            "total_bytes": self.manifest.total_bytes,
            "tensors": tensors,
        }

    def check_bytes(self) -> None:
        """Compare every tensor's bytes with its crc32. Blocks: call it in a thread.

        Raises:
            WeightsError: the file is shorter than the manifest says, or a checksum differs. Names the tensor.
        """
        size = os.fstat(self.fd).st_size
        if size < self.manifest.total_bytes:
            raise WeightsError(f"{self.manifest.path}: {size} bytes, the manifest says {self.manifest.total_bytes}")
        if not size:
            raise WeightsError(f"{self.manifest.path}: empty")
        with mmap.mmap(self.fd, size, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as view:

            def right(entry: TensorEntry) -> bool:
                return zlib.crc32(view[entry.offset : entry.offset + entry.nbytes]) == entry.crc32

            with ThreadPoolExecutor(CHECK_THREADS) as pool:
                answers = list(pool.map(right, self.manifest.tensors))
        wrong = [entry.name for entry, good in zip(self.manifest.tensors, answers, strict=True) if not good]
        if wrong:
            raise WeightsError(f"{self.manifest.path}: {wrong[0]}: checksum differs ({len(wrong)} tensors in all)")


@contextmanager
def open_weights(manifest: WeightManifest) -> Iterator[OpenWeights]:
    """Hold a weight file open.

    Raises:
        FileNotFoundError: newer versions have replaced it; take the newest manifest.
    """
    fd = os.open(manifest.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield OpenWeights(fd, manifest)
    finally:
        os.close(fd)
