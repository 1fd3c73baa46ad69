"""Deltas between weight files: exact whatever changed, small where little did, refused where damaged."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from singlestream.contracts import TensorEntry
from singlestream.errors import WeightsError
from singlestream.weight_delta import MAGIC, apply_delta, write_delta

NO_LIMIT = 1 << 40


def layout(dtype: str, counts: list[int]) -> tuple[list[TensorEntry], int]:
    """Tensors of so many values, at offsets that are multiples of 64."""
    size = {"bfloat16": 2, "float32": 4}[dtype]
    entries, offset = [], 0
    for number, count in enumerate(counts):
        offset = -(-offset // 64) * 64
        entry = TensorEntry(name=f"t{number}", dtype=dtype, shape=[count], offset=offset, nbytes=count * size, crc32=0)
        entries.append(entry)
        offset += count * size
    return entries, offset


def changed(old: np.ndarray, entries: list[TensorEntry], share: float, rng: np.random.Generator) -> np.ndarray:
    """The file after a step: a share of the values has another bit pattern, padding stays."""
    new = old.copy()
    for entry in entries:
        size = {"bfloat16": np.uint16, "float32": np.uint32}[entry.dtype]
        values = new[entry.offset : entry.offset + entry.nbytes].view(size)
        which = rng.random(len(values)) < share
        values[which] = rng.integers(0, np.iinfo(size).max, int(which.sum()), dtype=size, endpoint=True)
    return new


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float32"]),
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.001, 0.05, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_delta_leads_exactly_from_one_file_to_the_other(
    dtype: str, counts: list[int], share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    entries, size = layout(dtype, counts)
    old = rng.integers(0, 255, size, dtype=np.uint8, endpoint=True)
    new = changed(old, entries, share, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        written = write_delta(path, memoryview(old), memoryview(new), entries, NO_LIMIT)
        assert written is not None and written[0] == path.stat().st_size
        target = bytearray(old.tobytes())
        different = sum(
            int((old[e.offset : e.offset + e.nbytes].view(t) != new[e.offset : e.offset + e.nbytes].view(t)).sum())
            for e in entries
            for t in ({"bfloat16": np.uint16, "float32": np.uint32}[e.dtype],)
        )
        assert apply_delta(path, memoryview(target)) == different
        assert target == new.tobytes()


def test_a_small_step_in_bfloat16_is_a_small_delta(tmp_path: Path) -> None:
    """A hundredth of the values moved by one unit in the last place, over several blocks."""
    rng = np.random.default_rng(0)
    entries, size = layout("bfloat16", [2_500_000, 100])
    old = rng.integers(0, 255, size, dtype=np.uint8)
    new = old.copy()
    values = new[: entries[0].nbytes].view(np.uint16)
    which = rng.random(len(values)) < 0.01
    values[which] += rng.choice(np.array([1, 65535], np.uint16), int(which.sum()))
    written = write_delta(tmp_path / "d", memoryview(old), memoryview(new), entries, NO_LIMIT)
    assert written is not None
    assert written[0] < 0.02 * size


def test_a_delta_that_is_not_worth_it_leaves_no_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries, size = layout("float32", [10_000])
    old, new = (rng.integers(0, 255, size, dtype=np.uint8) for _ in range(2))
    assert write_delta(tmp_path / "d", memoryview(old), memoryview(new), entries, size) is None
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"X" + data[1:],
        lambda data: data[:-1],
        lambda data: data[: len(MAGIC) + 5],
        lambda data: data[:-3] + b"\x00\x01\x02",
        lambda data: data[: len(MAGIC)] + (2**40).to_bytes(8, "little") + data[len(MAGIC) + 8 :],
        lambda data: data[: len(MAGIC) + 8] + (0).to_bytes(4, "little") + data[len(MAGIC) + 12 :],
        lambda data: data[: len(MAGIC) + 8] + (7).to_bytes(4, "little") + data[len(MAGIC) + 12 :],
    ],
)
def test_damage_is_an_error(tmp_path: Path, damage: object) -> None:
    rng = np.random.default_rng(0)
    entries, size = layout("bfloat16", [5000])
    old = rng.integers(0, 255, size, dtype=np.uint8)
    new = changed(old, entries, 0.1, rng)
    assert write_delta(tmp_path / "d", memoryview(old), memoryview(new), entries, NO_LIMIT)
    (tmp_path / "d").write_bytes(damage((tmp_path / "d").read_bytes()))  # type: ignore[operator]
    with pytest.raises(WeightsError):
        apply_delta(tmp_path / "d", memoryview(bytearray(old.tobytes())))


def test_a_delta_for_a_smaller_file_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries, size = layout("bfloat16", [5000])
    old = rng.integers(0, 255, size, dtype=np.uint8)
    new = changed(old, entries, 1.0, rng)
    assert write_delta(tmp_path / "d", memoryview(old), memoryview(new), entries, NO_LIMIT)
    with pytest.raises(WeightsError, match="beyond"):
        apply_delta(tmp_path / "d", memoryview(bytearray(100)))
