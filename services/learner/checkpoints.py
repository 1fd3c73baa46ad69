"""Checkpoints: sharded, whole or absent, and resumable on another number of ranks.

A checkpoint is a folder ``step-<step>-<fence token>`` with the shards that torch's distributed checkpoint wrote and one
``state.json``: where the learner stood, and size and crc32 of every file. It is written under another name and renamed
when whole and on disk; it counts from the moment the resume pointer in Redis names it, which only the learner that
holds the fence can move (I12).

Saving copies the tensors to the host's memory and returns; a thread of its own, with a process group of its own, writes
them beside the next steps. One checkpoint is in flight at a time.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from services.learner.background import Background
from services.learner.batches import ConsumedLeases, Position
from services.learner.checkpoint_files import (
    ARCHIVE,
    FORMAT,
    STATE_FILE,
    UNREADABLE,
    checkpoint_name,
    crc32_of,
    incomplete,
    mismatch,
    named,
    read_state,
    step_of,
    sync_folder,
)
from services.learner.identity import changed, identity
from services.learner.model import parameters
from services.learner.policy import Policy
from singlestream.checksums import file_crc32
from singlestream.config import Config
from singlestream.errors import CheckpointError, SinglestreamError

log = logging.getLogger(__name__)

MODEL = "model."
"""Prefix of the policy's own tensors; the others are the optimizer's moments."""
DEADLINE_S = 3600.0
"""The slowest rank's shards must be written, or checked, within this; a rank that dies is noticed at once."""


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
            state["step"] = torch.zeros((), device=parameter.device)  # where a fused optimizer wants it
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors[f"{MODEL}{name}"] = parameter.detach()
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    return tensors


def optimizer_steps(policy: Policy) -> int:
    """Steps that the optimizer applied."""
    return max((int(moments["step"]) for moments in policy.optimizer.state.values()), default=0)


class Checkpoints:
    """Writes, finds, checks and loads the checkpoints of one run. Made on every rank at once.

    Args:
        config: of the run: `identity`, where checkpoints are (one folder each), ``keep_checkpoints`` (a resume may use
            any of them) and ``archive_every`` (of these some are kept for good when newer ones push them out).
        policy: whose tensors are saved and loaded.
    """

    def __init__(self, config: Config, policy: Policy) -> None:
        self.folder, self.policy, self.ranks = config.run.dir / "checkpoints", policy, policy.ranks
        self.keep, self.archive_every = config.learner.keep_checkpoints, config.learner.archive_every
        self.identity = identity(config, policy)
        self._group = self.ranks.own_group(DEADLINE_S)
        self._mesh = init_device_mesh("cpu", (self.ranks.world,))
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
            "identity": self.identity,
            "step": step,
            "z": z,
            "optimizer_steps": optimizer_steps(self.policy),
            "cursor": position.cursor,
            "consumed": position.consumed.to_json(),
            "ended": position.ended,
            "ranks": self.ranks.world,
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
        }

        def write() -> None:
            state["files"] = self._write(name, staged)
            self._complete(name, state)
            kept = self._kept(step)
            point(name, self._cursor(kept[-1]))
            self._remove_others(kept)
            log.info("checkpoint %s is complete, %.2f s after its step", name, time.monotonic() - started_s)

        self._beside.submit(write)
        return name

    def remove_partials(self) -> None:
        """Delete what crashes left half written. For rank 0, once it holds the fence: nobody else's write counts."""
        for path in self.folder.glob(".step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)

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
        cause = self.ranks.broadcast(f"{type(failure).__name__}: {failure}".encode() if failure else b"")
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

    def _write(self, name: str, staged: dict[str, torch.Tensor]) -> dict[str, dict[str, int]]:
        """Every rank writes its shard beside the others, and reads it back; returns size and crc32 of every file."""
        beside = self._partial(name)
        writer = FileSystemWriter(beside, single_file_per_rank=True, sync_files=True)
        beside.mkdir(parents=True, exist_ok=True)  # another rank's writer may have made it since
        dcp.save(staged, storage_writer=writer, process_group=self._group)
        shards = [beside / f"__{rank}_0.distcp" for rank in range(self.ranks.world)]
        rank, mine = self.ranks.rank, {}
        if shards[rank].exists():  # a rank to which no row fell writes none
            mine = {2 * rank: shards[rank].stat().st_size, 2 * rank + 1: crc32_of(shards[rank])}
        numbers = self._from_each(2 * self.ranks.world, mine)
        if UNREADABLE in numbers:
            raise CheckpointError(f"{name}: a shard that was just written cannot be read")
        files = {
            path.name: {"bytes": size, "crc32": crc32}
            for path, size, crc32 in zip(shards, numbers[::2], numbers[1::2], strict=True)
            if size
        }
        if self.ranks.first:
            rest = [path for path in beside.iterdir() if path.name not in files and path.name != STATE_FILE]
            files |= {path.name: {"bytes": path.stat().st_size, "crc32": file_crc32(path)} for path in rest}
        return files

    def _from_each(self, length: int, mine: dict[int, int]) -> list[int]:
        """Numbers by place, each from the one rank that has it; 0 where none has. Collective, within `DEADLINE_S`."""
        numbers = torch.zeros(length, dtype=torch.int64)
        for place, number in mine.items():
            numbers[place] = number
        dist.all_reduce(numbers, group=self._group)
        return [int(number) for number in numbers]

    def _complete(self, name: str, state: dict[str, Any]) -> None:
        """Write ``state.json`` and name the folder, each on disk before the next: one with a name is whole."""
        beside, final = self._partial(name), self.folder / name
        with (beside / STATE_FILE).open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(beside)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        sync_folder(self.folder)

    def _kept(self, step: int) -> list[Path]:
        """The newest checkpoints up to ``step``, newest first; those beyond it belong to no surviving lineage."""
        lineage = [path for path in named(self.folder) if step_of(path.name) <= step and self.problem(path) == ""]
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

    def problem(self, path: Path) -> str:
        """Why a checkpoint is none for this run, by its files' sizes and its `identity`; empty where it is one."""
        found = incomplete(path)
        if not found and (difference := changed(read_state(path)["identity"], self.identity)):
            return f"{path.name}: it is not of this run or model: {difference}"
        return found

    def refuse_unknown(self) -> None:
        """To be asked before the fence of a run that Redis has never seen is taken: a new one would clear the folder.

        Raises:
            CheckpointError: there are checkpoints of a run that this Redis has lost, or never had.
        """
        if left := named(self.folder):
            raise CheckpointError(
                f"{self.folder} holds checkpoints up to step {step_of(left[-1].name)}, and Redis knows nothing of "
                "their run: its data is lost, or it is another Redis. Restore its data, export what you need "
                "(python -m services.learner.export), or start a run of another name"
            )

    def choose(self, pointer: str | None) -> str | None:
        """Name of the checkpoint to resume from: the one pointed to, or else the newest good one before it.

        Collective: the ranks share the reading of every byte.

        Args:
            pointer: what the resume pointer holds, on every rank; None before the first checkpoint: the run starts
                afresh, and what a crash just before it pointed to its first checkpoint left is none.

        Raises:
            CheckpointError: none can be used; says what is wrong with each.
        """
        if pointer is None:
            if self.ranks.first and (ignored := [path.name for path in named(self.folder)]):
                log.warning("no resume pointer in redis: starting afresh, ignoring %s", ", ".join(ignored))
            return None
        problems = []
        for name in json.loads(self.ranks.from_first(lambda: json.dumps(self._candidates(pointer)).encode())):
            problem = self._found_wrong(name)
            if not problem:
                return str(name)
            if self.ranks.first:
                log.error("checkpoint refused: %s", problem)
            problems.append(problem)
        raise CheckpointError(
            f"none of the checkpoints in {self.folder} can be used: {'; '.join(problems)}. Restore one, or start a run "
            "of another name"
        )

    def _candidates(self, pointer: str) -> list[str]:
        """The checkpoint pointed to and those before it, newest first; rank 0's view is what counts."""
        last = step_of(pointer)
        older = [path for path in named(self.folder) if step_of(path.name) <= last and path.name != pointer]
        older.sort(key=lambda path: (step_of(path.name), path.stat().st_mtime_ns), reverse=True)
        return [pointer, *(path.name for path in older)]

    def _found_wrong(self, name: str) -> str:
        """`problem`, or the first file that fails its checksum. Collective: each rank reads its share of the files."""
        path = self.folder / name

        def look() -> bytes:
            problem = self.problem(path)
            return json.dumps([problem, {} if problem else read_state(path)["files"]]).encode()

        problem, files = json.loads(self.ranks.from_first(look))
        if problem:
            return str(problem)
        mine = list(enumerate(sorted(files)))[self.ranks.rank :: self.ranks.world]
        found = self._from_each(len(files), {place: crc32_of(path / file) for place, file in mine})
        return mismatch(name, files, found)

    def load(self, name: str) -> LearnerState:
        """Fill the policy's tensors, from any number of ranks, and return the rest of the state. Collective."""
        path = self.folder / name
        dcp.load(_tensors(self.policy), storage_reader=FileSystemReader(path), process_group=self._group)
        state = read_state(path)
        for moments in self.policy.optimizer.state.values():
            moments["step"].fill_(state["optimizer_steps"])
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))
        position = Position(state["cursor"], ConsumedLeases.from_json(state["consumed"]), state["ended"])
        return LearnerState(state["step"], state["z"], state["optimizer_steps"], position)
