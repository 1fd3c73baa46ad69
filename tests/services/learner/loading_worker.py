"""One rank that loads a model and may meanwhile allocate no more than three quarters of what the whole would take."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from services.learner.model import count_parameters, load_policy, parameters
from services.learner.ranks import Ranks
from singlestream.config import LearnerConfig

SHARE = 0.75
MASTER_BYTES = 4


def data_bytes() -> int:
    """What RLIMIT_DATA counts: private writable memory, touched or not."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmData:")[1].split()[0])


def main(small: Path, large: Path, whole_bytes: int) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(60)
    settings = LearnerConfig()
    load_policy(small, settings, 1.0, ranks.mesh(), ranks.device)  # imports and threads have their memory now
    before = data_bytes()
    mapped_bytes = sum(file.stat().st_size for file in large.glob("*.safetensors"))  # counts too, though never written
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (before + mapped_bytes + int(SHARE * whole_bytes), hard))
    scorer = load_policy(large, settings, 1.0, ranks.mesh(), ranks.device)
    assert MASTER_BYTES * count_parameters(scorer) == whole_bytes
    held = sum(MASTER_BYTES * parameter.to_local().numel() for _, parameter in parameters(scorer))
    assert held == whole_bytes // 2, "half of every parameter"
    assert data_bytes() - before >= held
    try:
        torch.empty(whole_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        assert "allocate memory" in str(error), error
    else:
        raise AssertionError("the limit does not hold, so it has shown nothing")
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
