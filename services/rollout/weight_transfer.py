"""Inside the engine's worker: load a mapped weight file, and end with the replica.

Imported by vLLM in each worker process because `engine.VllmEngine` names `WorkerExtension` as ``worker_extension_cls``;
importing registers the backend ``mapped_file``.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from services.rollout.process_env import ENGINE_MEMORY, OWNER_VARIABLE
from services.rollout.weight_verify import verify

BACKEND = "mapped_file"


@dataclass
class MappedFileInit(WeightTransferInitInfo):  # type: ignore[misc]
    """The backend needs nothing to start."""


@dataclass
class MappedFileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where each tensor of one version lies.

    Args:
        path: file to map; ``/proc/<pid>/fd/<n>`` of the replica, so that an unlinked file is still found.
        total_bytes: its size.
        tensors: (name, dtype, shape, byte offset) of each, in the order of loading: a layer's tensors together.
    """

    path: str
    total_bytes: int
    tensors: list[tuple[str, str, list[int], int]]


class MappedFileTransfer(WeightTransferEngine[MappedFileInit, MappedFileUpdate]):  # type: ignore[misc]
    """Weights by way of a file on a memory volume: mapped, never read into a buffer of its own."""

    init_info_cls, update_info_cls = MappedFileInit, MappedFileUpdate

    def init_transfer_engine(self, init_info: MappedFileInit) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Put the model's layers into the state in which checkpoint tensors may be loaded."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update: MappedFileUpdate) -> None:
        """Map the file and load every tensor."""
        self.model.load_weights(_mapped_tensors(update))

    def finish_weight_update(self) -> None:
        """Finish each layer; on CPU also pack a tied output layer again."""
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_output(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


def _mapped_tensors(update: MappedFileUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    with open(update.path, "rb") as file:
        # private and writable: torch warns of read-only buffers, and nothing ever writes
        mapping = mmap.mmap(
            file.fileno(), update.total_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    for name, dtype_name, shape, offset in update.tensors:
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(mapping, dtype=getattr(torch, dtype_name), count=count, offset=offset)
        yield name, tensor.view(shape)


def _repack_tied_output(model: torch.nn.Module) -> None:
    """On CPU the packed copy of a tied output layer keeps the old embedding after a reload: pack it again.

    Without this nothing fails and every log-probability is wrong.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class WorkerExtension:
    """Methods added to vLLM's worker, for `AsyncLLM.collective_rpc`."""

    model_runner: Any

    def verify_weights(self, update: dict[str, Any]) -> tuple[int, list[str]]:
        """Compare what the engine computes with, fused and packed layers included, with the published file.

        Returns, raises:
            see `weight_verify.verify`.
        """
        return verify(self.model_runner.model, dict(_mapped_tensors(MappedFileUpdate(**update))))

    def unlink_shared_memory(self) -> None:
        """Take the names of the engine's shared memory away, once all of its processes have it mapped.

        So none stays on the machine, however they end: Ray kills Python's own tracker, which would tidy, with a killed
        replica. At an orderly end vLLM looks for the names and says so on stderr (`FileNotFoundError`, ignored).
        """
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if path.startswith(ENGINE_MEMORY):
                Path(path).unlink(missing_ok=True)


def _end_with_owner() -> None:
    """End this engine's processes once the replica that owns them is gone, however it went.

    vLLM's engine core notices the death of its workers, but not that of the process that started it.
    """
    owner = int(os.environ.get(OWNER_VARIABLE, "0"))
    if not owner or owner == os.getpid():
        return
    parent = os.getppid()
    try:
        owner_fd = os.pidfd_open(owner)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    parent_fd = os.pidfd_open(parent) if parent not in (1, owner) else None

    def watch() -> None:
        poll = select.poll()
        poll.register(owner_fd, select.POLLIN)
        poll.poll()
        if parent_fd is not None:
            signal.pidfd_send_signal(parent_fd, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-owner", daemon=True).start()


WeightTransferEngineFactory.register_engine(BACKEND, MappedFileTransfer)
_end_with_owner()
