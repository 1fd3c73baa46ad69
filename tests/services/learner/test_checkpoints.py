"""Checkpoints of a policy in this process: written beside the steps, one at a time, and kept as the settings say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.learner.batches import ConsumedLeases, Position
from services.learner.checkpoints import ARCHIVE, Checkpoints, named
from services.learner.export import choose
from services.learner.model import full_tensors
from services.learner.policy import Policy
from services.learner.ranks import Ranks
from services.learner.samples import Sample, to_sample
from singlestream.config import LearnerConfig
from singlestream.errors import CheckpointError, Fenced
from tests.services.learner.recorded import trajectory

DEADLINE_S = 60.0
AT = Position("7-0", ConsumedLeases(), False)


@pytest.fixture(scope="module")
def policy(tiny: Path) -> Iterator[Policy]:
    ranks = Ranks(60)
    yield Policy(tiny, LearnerConfig(lr=1e-2, compute_dtype="float32"), 1.0, ranks)
    ranks.close()


@pytest.fixture
def batch() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [to_sample(trajectory(n, rng), 0, 4) for n in range(1, 5)]


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in full_tensors(policy.model, torch.float32)}


def nowhere(_name: str, _cursor: str) -> None:
    """Moves no pointer."""


def test_steps_go_on_while_a_checkpoint_of_the_state_before_is_written(
    policy: Policy, batch: list[Sample], tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, "run", policy, keep=2)
    begun, go_on = threading.Event(), threading.Event()
    pointed: list[str] = []
    left = tmp_path / ".step-00000002-a0.partial" / "__0_0.distcp"
    left.parent.mkdir()
    left.write_bytes(b"a crash left this")

    def point(name: str, cursor: str) -> None:
        assert not left.parent.exists(), "it made room before"
        begun.set()
        assert go_on.wait(DEADLINE_S), "the test did not go on"
        pointed.append(f"{name} {cursor}")

    before = weights(policy)
    name = checkpoints.save(3, 0.5, AT, "a1", point)
    policy.update(batch, np.array([1.0, -1.0, 1.0, -1.0]), 3)
    moved = weights(policy)
    assert not pointed and all(not torch.equal(before[key], moved[key]) for key in before)
    assert begun.wait(DEADLINE_S)
    go_on.set()
    checkpoints.settle()
    assert pointed == [f"{name} 7-0"]
    state = checkpoints.load(name)
    assert (state.step, state.z, state.position.cursor) == (3, 0.5, "7-0")
    after = weights(policy)
    assert all(torch.equal(before[key], after[key]) for key in before)
    checkpoints.close()


def test_the_newest_are_kept_for_a_resume_and_every_mth_for_good(policy: Policy, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "run", policy, keep=2, archive_every=4)
    cursors = []
    for step in (2, 4, 6, 8, 10):
        place = Position(f"{step}-0", ConsumedLeases(), False)
        checkpoints.save(step, 0.0, place, "a1", lambda _, cursor: cursors.append(cursor))
    checkpoints.settle()
    assert [path.name for path in named(tmp_path)] == ["step-00000008-a1", "step-00000010-a1"]
    assert [path.name for path in named(tmp_path / ARCHIVE)] == ["step-00000004-a1"]
    assert cursors == ["2-0", "2-0", "4-0", "6-0", "8-0"], "entries are trimmed below the older of the two kept"
    assert checkpoints.choose("step-00000010-a1") == "step-00000010-a1"
    for path in named(tmp_path):
        (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000010-a1: state.json.*step-00000008-a1: state.json"):
        checkpoints.choose("step-00000010-a1")
    assert choose(tmp_path, "step-00000004-a1").parent.name == ARCHIVE, "an export takes an archived one"
    assert choose(tmp_path, None).name == "step-00000004-a1"
    checkpoints.close()


def test_one_that_cannot_be_written_is_told_at_the_next(policy: Policy, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "run", policy, keep=2)

    def fenced(_name: str, _cursor: str) -> None:
        raise Fenced("another learner has taken over")

    checkpoints.save(1, 0.0, AT, "a1", fenced)
    with pytest.raises(Fenced):
        checkpoints.settle()
    checkpoints.close()

    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    checkpoints = Checkpoints(blocked, "run", policy, keep=2)
    checkpoints.save(1, 0.0, AT, "a1", nowhere)
    with pytest.raises(CheckpointError, match="NotADirectoryError"):
        checkpoints.save(2, 0.0, AT, "a1", nowhere)
    checkpoints.close()
