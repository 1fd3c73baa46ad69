"""A published policy: its number, its place on the drift clock, and where its weights lie."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from singlestream.contracts.message import Message


class TensorEntry(Message):
    """One tensor inside the weight file."""

    name: str
    """Parameter name as the Hugging Face checkpoint of the model spells it."""
    dtype: Literal["bfloat16", "float32"]
    shape: list[int]
    offset: int = Field(ge=0)
    """Byte offset in the file."""
    nbytes: int = Field(ge=0)
    crc32: int = Field(ge=0, lt=2**32)
    """zlib.crc32 of the tensor's bytes."""


class WeightDelta(Message):
    """A file that turns one version's weights into the next one's (`singlestream.weight_delta` has the format)."""

    base_version: int = Field(ge=0)
    """Version, and lineage, to which it applies."""
    base_lineage: int = Field(ge=1)
    version: int = Field(ge=0)
    """Version, and lineage, that it makes."""
    lineage: int = Field(ge=1)
    nbytes: int = Field(gt=0)
    crc32: int = Field(ge=0, lt=2**32)
    """zlib.crc32 of the whole file."""


class RemoteWeights(Message):
    """Where replicas on other machines fetch a version."""

    url: str = Field(pattern=r"^https?://[^\s/]+$")
    """Of the learner's HTTP: ``GET <url>/weights/<name>`` (`singlestream.weight_files` has the names)."""
    deltas: list[WeightDelta] = Field(default_factory=list)
    """A chain that ends at this version, oldest first; empty where only the whole file will do."""


class WeightManifest(Message):
    """Names every byte of one version's weight file."""

    path: str
    """File on the shared memory volume; never overwritten, removed when two newer ones exist."""
    total_bytes: int = Field(ge=0)
    tensors: list[TensorEntry] = Field(min_length=1)
    remote: RemoteWeights | None = Field(default=None, exclude_if=lambda remote: remote is None)
    """None: the file can be had through the shared memory volume alone. Left out of the message then."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for entry in self.tensors:
            if entry.offset + entry.nbytes > self.total_bytes:
                raise ValueError(f"tensor {entry.name} ends after the file's {self.total_bytes} bytes")
        return self


class PolicyVersion(Message):
    """Published by the learner after every optimizer step, and once at its start.

    Versions compare by (version, lineage): replicas load only what compares greater than what they hold.

    Example: ``PolicyVersion(version=4, lineage=1, z=0.31, manifest=..., published_at_s=1.7e9)``
    """

    version: int = Field(ge=0)
    """Number of optimizer steps behind these weights."""
    lineage: int = Field(ge=1)
    """How many times the learner of this run has started."""
    z: float = Field(ge=0.0)
    """Drift clock: the sum over versions of mean |Δ log p| / D_half; dimensionless, never decreases."""
    drift: float = Field(ge=0.0)
    """mean |log π_v − log π_{v−1}| over the probe's action tokens; 0 for the first version."""
    manifest: WeightManifest
    published_at_s: float

    def newer_than(self, other: tuple[int, int] | None) -> bool:
        """Whether a replica that holds ``other`` = (version, lineage), or nothing (None), should load this one."""
        return other is None or (self.version, self.lineage) > other
