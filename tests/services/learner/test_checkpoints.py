"""Checkpoints of a policy in this process: written beside the steps, one at a time, and kept as the settings say."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.learner.batches import ConsumedLeases, Position
from services.learner.checkpoint_files import ARCHIVE, named
from services.learner.checkpoints import Checkpoints
from services.learner.export import choose
from services.learner.identity import changed
from services.learner.model import full_tensors
from services.learner.policy import Policy
from services.learner.ranks import Ranks
from services.learner.samples import Sample, to_sample
from singlestream.config import Config, LearnerConfig
from singlestream.errors import CheckpointError, Fenced
from tests.services.learner.recorded import trajectory

DEADLINE_S = 60.0
MakeConfig = Callable[..., Config]
AT = Position("7-0", ConsumedLeases(), False)


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> MakeConfig:
    """Settings with checkpoints in ``tmp_path/run/checkpoints``."""

    def make(group_size: int = 1, **learner: Any) -> Config:
        return Config.model_validate(
            {
                "run": {"name": "run", "model": tiny, "runs_dir": tmp_path, "total_steps": 9},
                "learner": {"lr": 1e-2, "compute_dtype": "float32"} | learner,
                "value_store": {"group_size": group_size},
            }
        )

    return make


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(60)
    yield group
    group.close()


@pytest.fixture(scope="module")
def policy(tiny: Path, ranks: Ranks) -> Policy:
    return Policy(tiny, LearnerConfig(lr=1e-2, compute_dtype="float32"), 1.0, ranks)


@pytest.fixture
def batch() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [to_sample(trajectory(n, rng), 0, 4) for n in range(1, 5)]


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in full_tensors(policy.model, torch.float32)}


def nowhere(_name: str, _cursor: str) -> None:
    """Moves no pointer."""


def test_steps_go_on_while_a_checkpoint_of_the_state_before_is_written(
    policy: Policy, batch: list[Sample], config: MakeConfig
) -> None:
    checkpoints = Checkpoints(config(), policy)
    begun, go_on = threading.Event(), threading.Event()
    pointed: list[str] = []

    def point(name: str, cursor: str) -> None:
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


def test_the_newest_are_kept_for_a_resume_and_every_mth_for_good(policy: Policy, config: MakeConfig) -> None:
    checkpoints = Checkpoints(config(archive_every=4), policy)
    folder, cursors = checkpoints.folder, []
    for step in (2, 4, 6, 8, 10):
        place = Position(f"{step}-0", ConsumedLeases(), False)
        checkpoints.save(step, 0.0, place, "a1", lambda _, cursor: cursors.append(cursor))
    checkpoints.settle()
    assert [path.name for path in named(folder)] == ["step-00000008-a1", "step-00000010-a1"]
    assert [path.name for path in named(folder / ARCHIVE)] == ["step-00000004-a1"]
    assert cursors == ["2-0", "2-0", "4-0", "6-0", "8-0"], "entries are trimmed below the older of the two kept"
    assert checkpoints.choose("step-00000010-a1") == "step-00000010-a1"

    newest, before = (folder / f"step-000000{step}-a1" for step in ("10", "08"))
    shard = newest / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert checkpoints.choose(newest.name) == before.name, "a byte that changed"
    (newest / "state.json").write_text("")
    assert checkpoints.choose(newest.name) == before.name, "as a power cut leaves a file that was not synced"
    (before / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000010-a1: state.json.*step-00000008-a1: state.json"):
        checkpoints.choose(newest.name)
    assert choose(folder, "step-00000004-a1").parent.name == ARCHIVE, "an export takes an archived one"
    assert choose(folder, None).name == "step-00000004-a1"
    checkpoints.close()


def test_what_was_written_is_on_disk_before_it_has_its_name(
    policy: Policy, config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of syncs and of the rename, as the kernel is told it."""
    told: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        told.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        told.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoints = Checkpoints(config(), policy)
    name = checkpoints.save(1, 0.0, AT, "a1", lambda *_: told.append("pointed"))
    checkpoints.settle()
    checkpoints.close()
    partial = f".{name}.partial"
    assert told[-5:] == ["state.json", partial, f"{partial} -> {name}", "checkpoints", "pointed"]
    assert "__0_0.distcp" in told[:-5]


def test_a_checkpoint_is_refused_where_what_it_means_has_changed(tiny: Path, ranks: Ranks, config: MakeConfig) -> None:
    pytest.importorskip("peft")

    def of(settings: Config) -> Checkpoints:
        return Checkpoints(settings, Policy(tiny, settings.learner, 1.0, ranks))

    first = of(config(lora_rank=2, lora_alpha=4.0))
    name = first.save(1, 0.0, AT, "a1", nowhere)
    first.settle()
    first.close()
    for other, difference in (
        (config(lora_rank=2, lora_alpha=8.0), r"learner.lora_alpha was 4.0, is 8.0$"),
        (config(lora_rank=2, lora_alpha=4.0, lora_targets=("q_proj",)), "names and shapes"),
        (config(), "learner.lora_rank was 2, is 0"),
    ):
        assert re.search(difference, of(other).problem(first.folder / name))
    grouped = config(8, lora_rank=2, lora_alpha=4.0, advantage="grpo")
    assert changed(first.identity, of(grouped).identity) == "value_store.group_size was 1, is 8"


def test_a_zombie_leaves_the_folder_to_the_learner_that_has_taken_over(policy: Policy, config: MakeConfig) -> None:
    zombie = Checkpoints(config(keep_checkpoints=1), policy)
    zombie.save(2, 0.0, AT, "a1", nowhere)
    zombie.settle()
    writing = zombie.folder / ".step-00000003-b2.partial" / "__0_0.distcp"
    writing.parent.mkdir()
    writing.write_bytes(b"the other is at it")

    def fenced(_name: str, _cursor: str) -> None:
        raise Fenced("another learner has taken over")

    zombie.save(3, 0.0, AT, "a1", fenced)
    with pytest.raises(Fenced):
        zombie.settle()
    assert writing.is_file()
    assert (zombie.folder / "step-00000002-a1").is_dir(), "what it would push out stays"
    zombie.remove_partials()
    assert not writing.parent.exists(), "the start of the next one removes what was left"
    zombie.close()


def test_checkpoints_that_redis_knows_nothing_of_are_refused(policy: Policy, config: MakeConfig) -> None:
    checkpoints = Checkpoints(config(), policy)
    checkpoints.refuse_unknown()
    for step in (1, 2):
        checkpoints.save(step, 0.0, AT, "a1", nowhere)
    checkpoints.settle()
    with pytest.raises(CheckpointError, match="checkpoints up to step 2, and Redis knows nothing of their run"):
        checkpoints.refuse_unknown()
    checkpoints.close()


def test_whole_tensors_are_copied_to_the_host_by_who_keeps_them(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank gathers, and all but one drop what they gathered."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda _: pytest.fail("a copy that nobody asked for"))
    assert len(list(full_tensors(policy.model, torch.bfloat16))) == len(list(policy.model.parameters()))


def test_one_that_cannot_be_written_is_told_at_the_next(policy: Policy, config: MakeConfig) -> None:
    checkpoints = Checkpoints(config(), policy)

    def fenced(_name: str, _cursor: str) -> None:
        raise Fenced("another learner has taken over")

    checkpoints.save(1, 0.0, AT, "a1", fenced)
    with pytest.raises(Fenced):
        checkpoints.settle()
    checkpoints.close()

    checkpoints = Checkpoints(config(), policy)
    shutil.rmtree(checkpoints.folder)
    checkpoints.folder.write_text("no folder")
    checkpoints.save(1, 0.0, AT, "a1", nowhere)
    with pytest.raises(CheckpointError, match="NotADirectoryError"):
        checkpoints.save(2, 0.0, AT, "a1", nowhere)
    checkpoints.close()
