"""``torchrun -m services.learner --config FILE``; ``python -m`` starts the ranks that the settings name."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import closing
from pathlib import Path

from singlestream.config import Config, load_config
from singlestream.errors import SinglestreamError
from singlestream.telemetry import setup_logging

log = logging.getLogger(__name__)


def _threads(deterministic: bool, ranks: int) -> int:
    """Compute threads of one rank: ``OMP_NUM_THREADS`` where it is set, else half the cores: services share them."""
    if deterministic:
        return 1
    named = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0))
    return int(named) if named.isdigit() and int(named) else max(1, cores // 2 // ranks)


def run(config: Config) -> int:
    """Train on this rank; returns the exit code."""
    # beside other services spinning threads cost more than they win; libgomp reads this when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from services.learner.learner import PEER_MARGIN_S, Learner
    from services.learner.loop import train
    from services.learner.ranks import Ranks

    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(_threads(config.learner.deterministic, local_ranks))
    torch.use_deterministic_algorithms(config.learner.deterministic)
    try:
        timeout_s = config.learner.redis_deadline_s + PEER_MARGIN_S
        with closing(Ranks(timeout_s)) as ranks, closing(Learner(config, ranks)) as learner:
            train(learner)
    except SinglestreamError as error:
        log.error("%s: %s", type(error).__name__, error)
        return 1
    except Exception as error:  # the top of the process: the cause belongs in its log
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        log.exception("rank %s of %s cannot go on: %s", rank, world, error)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, read the settings, and train or start the ranks that will."""
    parser = argparse.ArgumentParser(prog="python -m services.learner", description=__doc__)
    parser.add_argument("--config", type=Path, help="the run's TOML file (default: SINGLESTREAM_CONFIG)")
    options = parser.parse_args(argv)
    rank = os.environ.get("RANK")
    setup_logging("learner" if rank is None else f"learner[{rank}]")
    try:
        config = load_config(options.config)
    except SinglestreamError as error:
        log.error("%s", error)
        return 2
    if rank is None and config.learner.ranks > 1:
        from services.learner.launch import launch

        return launch(config.learner.ranks, sys.argv[1:] if argv is None else argv)
    return run(config)


if __name__ == "__main__":
    sys.exit(main())
