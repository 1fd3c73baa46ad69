"""What the learner's ranks say to each other: bytes and sums, never pickled objects."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from singlestream.errors import SinglestreamError

GOOD = b"\0"
"""What rank 0's answers begin with, and no text of an error does."""


class Ranks:
    """This process among its peers.

    Args:
        timeout_s: a collective that takes longer ends the process; a peer's death is noticed at once.

    Without ``RANK`` in the environment (no launcher) this is the only rank, and no port is opened.
    """

    def __init__(self, timeout_s: float) -> None:
        self.backend = "nccl" if torch.cuda.is_available() else "gloo"
        # rendezvous, flags and messages travel on CPU tensors
        backend = "cpu:gloo,cuda:nccl" if self.backend == "nccl" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")
        if self.backend == "nccl":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone talks to Redis."""
        return bool(self.rank == 0)

    def own_group(self, timeout_s: float) -> dist.ProcessGroup:
        """A gloo group of all ranks for one background thread, beside the collectives of the others. Collective.

        Args:
            timeout_s: one of its collectives that takes longer fails.
        """
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def mesh(self) -> DeviceMesh:
        """One dimension over all ranks."""
        return init_device_mesh(self.device.type, (self.world,))

    def from_first(self, ask: Callable[[], bytes]) -> bytes:
        """What ``ask`` returns on rank 0, on every rank. Collective.

        Raises:
            SinglestreamError: it failed, on every rank; on rank 0 whatever it raised, elsewhere with that as the cause.
        """
        answer, failure = b"", None
        if self.first:
            try:
                answer = GOOD + ask()
            except Exception as error:  # the others must hear of it before this rank raises
                answer, failure = f"{type(error).__name__}: {error}".encode(), error
        said = self.broadcast(answer)
        if failure is not None:
            raise failure
        if not said.startswith(GOOD):
            raise SinglestreamError(f"rank 0 failed: {said.decode()}")
        return said.removeprefix(GOOD)

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank. Collective."""
        if self.world == 1:
            return data
        size = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(size, 0)
        if self.first:
            buffer = torch.frombuffer(bytearray(data + b"\0"), dtype=torch.uint8)[: int(size)]
        else:
            buffer = torch.empty(int(size), dtype=torch.uint8)
        if len(buffer):
            dist.broadcast(buffer, 0)
        return bytes(buffer.numpy().tobytes())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks of a CPU tensor, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over ranks of a CPU tensor, in place."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.max(torch.tensor([float(flag)]))[0] > 0)

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()
