"""Checkpoints: sharded, whole or absent, and resumable on another number of ranks.

A checkpoint is a folder ``step-<step>-<fence token>`` with the shards that torch's distributed checkpoint wrote and one
``state.json``: where the learner stood, and size and crc32 of every file. It is written under another name and renamed
when whole; it counts from the moment the resume pointer in Redis names it, which only the learner that holds the fence
can move (I12).

Saving copies the tensors to the host's memory and returns; a thread of its own, with a process group of its own, writes
them beside the next steps. One checkpoint is in flight at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from services.learner.background import Background
from services.learner.batches import ConsumedLeases, Position
from services.learner.model import parameters
from services.learner.policy import Policy
from singlestream.checksums import file_crc32
from singlestream.errors import CheckpointError, SinglestreamError

log = logging.getLogger(__name__)

FORMAT = 1
STATE_FILE = "state.json"
ARCHIVE = "archive"
"""Folder beside the checkpoints of a resume: what is kept for good, to export."""
MODEL = "model."
"""Prefix of the policy's own tensors; the others are the optimizer's moments."""
_NAME = re.compile(r"^step-(\d{8})-([0-9a-f]+)$")


@dataclass(frozen=True)
class LearnerState:
    """All of the learner's state but its tensors.

    Args:
        step: optimizer steps taken, skipped ones included.
        z: the drift clock.
        optimizer_steps: steps that the optimizer applied.
        position: in the trajectory stream.
    """

    step: int
    z: float
    optimizer_steps: int
    position: Position


def checkpoint_name(step: int, token: str) -> str:
    """Folder name of a checkpoint."""
    return f"step-{step:08d}-{token}"


def step_of(name: str) -> int:
    """Step in a checkpoint's name. Raises `CheckpointError` for any other name."""
    match = _NAME.match(name)
    if match is None:
        raise CheckpointError(f"{name!r} is no name of a checkpoint")
    return int(match[1])


def fingerprint(run: str, policy: Policy) -> str:
    """What a checkpoint must share with the run that loads it: the run's name, and every parameter's name and shape."""
    shapes = [(name, list(parameter.shape)) for name, parameter in parameters(policy.model)]
    return hashlib.sha256(json.dumps([run, shapes]).encode()).hexdigest()


def _tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """Masters and both moments of every parameter that trains, sharded as they are; loading fills these very tensors.

    What does not train (the model under an adapter) is read from the model's own folder at every start.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters(policy.model):
        if not parameter.requires_grad:
            continue
        state = policy.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors[f"{MODEL}{name}"] = parameter.detach()
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    return tensors


def optimizer_steps(policy: Policy) -> int:
    """Steps that the optimizer applied."""
    return max((int(moments["step"]) for moments in policy.optimizer.state.values()), default=0)


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``. Raises OSError or ValueError."""
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    return state


def damage(path: Path, deep: bool = True) -> str:
    """What is wrong with a checkpoint's files; empty where all is well.

    Args:
        path: the checkpoint's folder.
        deep: read every byte for its checksum, not sizes alone.
    """
    try:
        state = read_state(path)
    except (OSError, ValueError) as error:
        return f"{path.name}: {STATE_FILE} cannot be read: {error}"
    if state.get("format") != FORMAT:
        return f"{path.name}: format {state.get('format')!r}; this build reads {FORMAT}"
    for name, expected in state["files"].items():
        file = path / name
        if not file.is_file():
            return f"{path.name}: {name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{path.name}: {name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if deep and file_crc32(file) != expected["crc32"]:
            return f"{path.name}: {name} fails its checksum"
    return ""


def named(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.match(path.name)), key=lambda path: path.name)


class Checkpoints:
    """Writes, finds, checks and loads the checkpoints of one run. Made on every rank at once.

    Args:
        folder: holds one folder a checkpoint.
        run: name of the run.
        policy: whose tensors are saved and loaded.
        keep: newest checkpoints kept; a resume may use any of them.
        archive_every: a checkpoint whose step is a multiple of it is kept for good when newer ones push it out;
            0 keeps none.
    """

    def __init__(self, folder: Path, run: str, policy: Policy, keep: int, archive_every: int = 0) -> None:
        self.folder, self.policy, self.keep, self.archive_every = folder, policy, keep, archive_every
        self.fingerprint = fingerprint(run, policy)
        self._group = policy.ranks.own_group()
        self._mesh = init_device_mesh("cpu", (policy.ranks.world,))
        self._beside = Background("checkpoint")

    def save(
        self, step: int, z: float, position: Position | None, token: str, point: Callable[[str, str], None]
    ) -> str:
        """Copy the state of now, and begin to write it. Waits first for the checkpoint in flight. Collective.

        Args:
            step: optimizer steps taken.
            z: the drift clock.
            position: rank 0's; None elsewhere.
            token: fence token, the same on every rank.
            point: moves the resume pointer, given the name and the cursor of the oldest one kept; rank 0 calls it, on
                the writing thread, when every file is on disk.

        Returns:
            The checkpoint's name.

        Raises:
            SinglestreamError: the checkpoint in flight could not be written; see `settle`.
        """
        self.settle()
        started_s = time.monotonic()
        name = checkpoint_name(step, token)
        staged = self._staged()
        if position is None:
            self._beside.submit(lambda: self._write(name, staged))
            return name
        state = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "step": step,
            "z": z,
            "optimizer_steps": optimizer_steps(self.policy),
            "cursor": position.cursor,
            "consumed": position.consumed.to_json(),
            "ended": position.ended,
            "ranks": self.policy.ranks.world,
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
        }

        def write() -> None:
            self._remove_partials(name)
            self._write(name, staged)
            self._complete(name, state)
            kept = self._kept(step)
            point(name, self._cursor(kept[-1]))
            self._remove_others(kept)
            log.info("checkpoint %s is complete, %.2f s after its step", name, time.monotonic() - started_s)

        self._beside.submit(write)
        return name

    def settle(self) -> None:
        """Wait until the checkpoint in flight counts. Collective.

        Raises:
            SinglestreamError: it could not be written, or not be pointed to; on every rank, with the cause.
        """
        failure: BaseException | None = None
        try:
            self._beside.wait()
        except (Exception, CheckpointException) as error:  # every rank must hear of it before this one raises
            failure = error
        cause = self.policy.ranks.broadcast(f"{type(failure).__name__}: {failure}".encode() if failure else b"")
        if isinstance(failure, SinglestreamError):
            raise failure
        if failure is not None or cause:
            where = "rank 0 failed: " if failure is None else ""
            raise CheckpointError(f"{where}{cause.decode() or failure}") from failure

    def check(self) -> None:
        """Raise the error of the checkpoint in flight, if there is one already."""
        self._beside.check()

    def close(self) -> None:
        """Finish what is being written; an error that nobody has seen is logged."""
        self._beside.close()

    def _staged(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU, sharded alike: the next step may change the originals."""
        staged: dict[str, torch.Tensor] = {}
        for name, tensor in _tensors(self.policy).items():
            assert isinstance(tensor, DTensor)  # noqa: S101  FSDP shards every parameter
            local = tensor.to_local().detach().to("cpu", copy=True)
            staged[name] = DTensor.from_local(
                local, self._mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        return staged

    def _partial(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def _remove_partials(self, name: str) -> None:
        """Delete what crashes left, which a full disk needs first; the one to be written may be another rank's now."""
        for path in self.folder.glob(".step-*.partial"):
            if path != self._partial(name):
                shutil.rmtree(path, ignore_errors=True)

    def _write(self, name: str, staged: dict[str, torch.Tensor]) -> None:
        """Every rank writes its shards beside the others."""
        writer = FileSystemWriter(self._partial(name), single_file_per_rank=True, sync_files=True)
        self._partial(name).mkdir(parents=True, exist_ok=True)  # another rank's writer may have made it since
        dcp.save(staged, storage_writer=writer, process_group=self._group)

    def _complete(self, name: str, state: dict[str, Any]) -> None:
        """Note size and checksum of every file, and give the folder its name."""
        beside, final = self._partial(name), self.folder / name
        state["files"] = {
            path.name: {"bytes": path.stat().st_size, "crc32": file_crc32(path)}
            for path in sorted(beside.iterdir())
            if path.name != STATE_FILE
        }
        (beside / STATE_FILE).write_text(json.dumps(state))
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)

    def _kept(self, step: int) -> list[Path]:
        """The newest checkpoints up to ``step``, newest first; those beyond it belong to no surviving lineage."""
        lineage = [
            path for path in named(self.folder) if step_of(path.name) <= step and self.problem(path, deep=False) == ""
        ]
        newest_first = sorted(lineage, key=lambda p: (step_of(p.name), p.stat().st_mtime_ns), reverse=True)
        return newest_first[: self.keep]

    def _remove_others(self, kept: list[Path]) -> None:
        """Delete what no resume may use any more, or archive it; the stream's entries behind it are gone."""
        newest = step_of(kept[0].name)
        for path in named(self.folder):
            if path in kept:
                continue
            step = step_of(path.name)
            if self.archive_every and step % self.archive_every == 0 and step <= newest:
                self._archive(path)
            shutil.rmtree(path, ignore_errors=True)

    def _archive(self, path: Path) -> None:
        """Move a checkpoint away; one of the same step from a start that was undone makes room."""
        archive = self.folder / ARCHIVE
        archive.mkdir(exist_ok=True)
        for other in named(archive):
            if step_of(other.name) == step_of(path.name):
                shutil.rmtree(other, ignore_errors=True)
        path.rename(archive / path.name)

    def _cursor(self, path: Path) -> str:
        return str(read_state(path)["cursor"])

    def problem(self, path: Path, deep: bool = True) -> str:
        """What is wrong with a checkpoint for this run; empty where it can be loaded. See `damage`."""
        found = damage(path, deep)
        if not found and read_state(path).get("fingerprint") != self.fingerprint:
            return f"{path.name}: it belongs to another run or another model"
        return found

    def choose(self, pointer: str | None) -> str | None:
        """Name of the checkpoint to resume from: the one pointed to, or else the newest good one before it.

        Args:
            pointer: what the resume pointer holds; None before the first checkpoint: the run starts afresh.

        Raises:
            CheckpointError: none can be used; says what is wrong with each.
        """
        if pointer is None:
            if ignored := [path.name for path in named(self.folder)]:
                log.warning("no resume pointer in redis: starting afresh, ignoring %s", ", ".join(ignored))
            return None
        last = step_of(pointer)
        older = [path for path in named(self.folder) if step_of(path.name) <= last and path.name != pointer]
        older.sort(key=lambda path: (step_of(path.name), path.stat().st_mtime_ns), reverse=True)
        problems = []
        for path in (self.folder / pointer, *older):
            problem = self.problem(path)
            if not problem:
                return path.name
            log.error("checkpoint refused: %s", problem)
            problems.append(problem)
        raise CheckpointError(
            f"none of the checkpoints in {self.folder} can be used: {'; '.join(problems)}. Restore one, or start a run "
            "of another name"
        )

    def load(self, name: str) -> LearnerState:
        """Fill the policy's tensors, from any number of ranks, and return the rest of the state. Collective."""
        path = self.folder / name
        dcp.load(_tensors(self.policy), storage_reader=FileSystemReader(path))
        state = read_state(path)
        for moments in self.policy.optimizer.state.values():
            moments["step"].fill_(state["optimizer_steps"])
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))
        position = Position(state["cursor"], ConsumedLeases.from_json(state["consumed"]), state["ended"])
        return LearnerState(state["step"], state["z"], state["optimizer_steps"], position)
