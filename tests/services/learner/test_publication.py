"""Weights as files, and the one thread beside the loop that announces them in order."""

from __future__ import annotations

import logging
import resource
import threading
from pathlib import Path

import pytest
import torch

from services.learner.background import Background
from services.learner.publication import NEXT, reserve, seal, take_snapshot, write_delta_file
from services.rollout.manifest import ModelTensors, check_manifest, open_weights
from singlestream.errors import WeightsError
from singlestream.weight_files import remove_older, weights_name

WEIGHTS = {"a": torch.arange(100, dtype=torch.bfloat16).view(10, 10), "b": torch.ones(3, dtype=torch.bfloat16)}
SHAPES = ModelTensors({"a": (10, 10), "b": (3,)}, tied=False)


def test_a_snapshot_is_named_only_when_it_is_sealed_and_fills_the_room_that_was_kept(tmp_path: Path) -> None:
    reserve(tmp_path, 100_000)
    kept = (tmp_path / NEXT).stat()
    assert kept.st_blocks * 512 >= 100_000, "allocated, not only long"
    snapshot = take_snapshot(WEIGHTS.items(), tmp_path, 3, 2, "bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["v00000003-l2.weights.partial"]
    manifest = seal(snapshot)
    assert Path(manifest.path) == tmp_path / weights_name(3, 2)
    assert Path(manifest.path).stat().st_ino == kept.st_ino
    assert Path(manifest.path).stat().st_size == manifest.total_bytes == 64 * 4 + 6
    check_manifest(manifest, SHAPES)
    with open_weights(manifest) as weights:
        weights.check_bytes()


def test_a_published_file_is_never_written_again(tmp_path: Path) -> None:
    """A replica that has it mapped, or is reading it, sees the same bytes for as long as it wants."""
    first = seal(take_snapshot(WEIGHTS.items(), tmp_path, 1, 1, "bfloat16"))
    before = Path(first.path).read_bytes()
    with open_weights(first) as weights:
        for version in (2, 3, 4):
            seal(take_snapshot(((n, -one) for n, one in WEIGHTS.items()), tmp_path, version, 1, "bfloat16"))
            remove_older(tmp_path)
            reserve(tmp_path, first.total_bytes)
        assert not Path(first.path).exists()
        assert Path(f"/proc/self/fd/{weights.fd}").read_bytes() == before
        weights.check_bytes()


def test_other_layouts_have_no_delta(tmp_path: Path) -> None:
    one = seal(take_snapshot(WEIGHTS.items(), tmp_path, 1, 1, "bfloat16"))
    two = seal(take_snapshot([("a", WEIGHTS["a"])], tmp_path, 2, 1, "bfloat16"))
    assert write_delta_file(one, (1, 1), two, (2, 1)) is None


def test_a_delta_that_finds_no_room_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = [torch.randn(200_000, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2)]
    many[1] = torch.where(torch.arange(200_000) % 3 == 0, many[1], many[0])
    one, two = (
        seal(take_snapshot([("a", tensor)], tmp_path, version, 1, "bfloat16"))
        for version, tensor in enumerate(many, start=1)
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert write_delta_file(one, (1, 1), two, (2, 1)) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "version 2 goes without a delta: [Errno 27] File too large" in caplog.text
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.delta"))
    assert write_delta_file(one, (1, 1), two, (2, 1)) is not None


def test_a_full_volume_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No space left on device; three versions of the weights must fit there"):
        take_snapshot(_tensors_on_a_full_volume(), tmp_path, 1, 1, "bfloat16")


def _tensors_on_a_full_volume():  # type: ignore[no-untyped-def]
    yield "a", WEIGHTS["a"]
    raise OSError(28, "No space left on device")


def test_order_is_kept_and_an_error_ends_everything_behind_it(caplog: pytest.LogCaptureFixture) -> None:
    beside, done, go = Background("test"), [], threading.Event()
    beside.submit(lambda: done.append(go.wait(20)))
    for number in range(3):
        beside.submit(lambda number=number: done.append(number))
    go.set()
    beside.wait()
    assert done == [True, 0, 1, 2]

    def fail() -> None:
        raise WeightsError("no room")

    go.clear()
    beside.submit(lambda: done.append(go.wait(20)))
    beside.submit(fail)
    beside.submit(lambda: done.append("never"))
    go.set()
    with pytest.raises(WeightsError, match="no room"):
        beside.wait()
    with pytest.raises(WeightsError, match="no room"):
        beside.submit(lambda: done.append("nor this"))
    with pytest.raises(WeightsError, match="no room"):
        beside.check()
    with caplog.at_level(logging.ERROR):
        beside.close()
    assert done[4:] == [True]
    assert "WeightsError: no room" in caplog.text
