"""What the service's processes need of their surroundings: a guarded address, and the engine's environment variables.

The variables are set before vLLM or Ray is imported; what the user has set stays. Sources: on CPU, dynamo compiles for
half a minute at the first request for log-probabilities; several engines on one machine fight for the same cores when
each binds its threads.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from singlestream.config import LOOPBACK, Config
from singlestream.errors import ConfigError

OWNER_VARIABLE = "SINGLESTREAM_ROLLOUT_OWNER"
"""Process id of the replica; the engine's processes end when it does."""

ENGINE_MEMORY = "/dev/shm/psm_"  # noqa: S108  a name that is compared, not made
"""How the shared memory begins by which vLLM's processes speak with each other (Python's ``SharedMemory``)."""

NODE_VARIABLE = "SINGLESTREAM_NODE"
"""Name of this machine or container; `node` sets it for the replicas of a Ray node."""


def node_name() -> str:
    """Where this process runs, as a drain mark names it: `NODE_VARIABLE`, or the host's name."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()


def guarded(config: Config) -> Config:
    """The same settings. Raises `ConfigError` if the interface were open to other machines without a token."""
    if config.rollout.host not in LOOPBACK and config.rollout.token is None:
        raise ConfigError(f"rollout.host = {config.rollout.host!r} is not loopback: set rollout.token")
    return config


def has_gpu() -> bool:
    """Whether an NVIDIA device node exists; asking torch would import it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES", "all") != ""


def engine_variables(config: Config) -> dict[str, str]:
    """Variables that every process of an engine needs, without what the environment already sets."""
    variables = {
        "HF_HUB_OFFLINE": "1" if config.run.model.exists() else "0",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if not has_gpu():
        threads = config.rollout.cpu_threads
        if threads is None and config.rollout.replicas > 1:
            threads = 1  # several engines would bind their threads to the same cores
        variables |= {
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.rollout.kv_cache_gib))),
        }
        if threads is not None:
            variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return {name: value for name, value in variables.items() if name not in os.environ}


def apply_engine_variables(config: Config) -> None:
    """Set the engine's variables in this process, and name it as the owner of the engine's processes."""
    os.environ.update(engine_variables(config))
    os.environ[OWNER_VARIABLE] = str(os.getpid())
