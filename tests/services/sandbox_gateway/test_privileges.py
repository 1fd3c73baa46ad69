"""The gateway never runs as root, whoever starts it, and runs as an ordinary user as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from services.sandbox_gateway.privileges import UNPRIVILEGED_ID
from tests.services.sandbox_gateway.gateway import NAMED, Gateway

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parents[3]


def test_no_process_of_the_gateway_is_root(gateway: Gateway) -> None:
    family = [psutil.Process(gateway.process.pid), *gateway.descendants()]
    expected = UNPRIVILEGED_ID if os.getuid() == 0 else os.getuid()
    assert {uid for process in family for uid in process.uids()} == {expected}


def test_runs_have_no_privileges(gateway: Gateway) -> None:
    """Seen from outside, through the kernel's own account of a run in progress."""
    locks = "import fcntl\nfile = open('/tmp/a', 'w')\nfor n in range(100): fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * n)"
    with gateway.waiting(code=f"{locks}\n{NAMED}time.sleep(60)", timeout_s=60):
        [run] = gateway.wait_for_runs(1)
        text = Path(f"/proc/{run.pid}/status").read_text()
        held = Path("/proc/locks").read_text()
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["Threads"].strip() == "1"
    assert status["NSpid"].split()[-1] == "2"
    assert str(run.pid) not in held.split(), "memory of the kernel's that no limit counts"


WITHOUT_NAMESPACES = """
import errno, sys
import pyseccomp as seccomp
NEW_USER = 0x10000000
deny = seccomp.SyscallFilter(seccomp.ALLOW)
for call in ("clone", "unshare"):
    deny.add_rule(seccomp.ERRNO(errno.EPERM), call, seccomp.Arg(0, seccomp.MASKED_EQ, NEW_USER, NEW_USER))
deny.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
deny.load()
from services.sandbox_gateway.check import check
from singlestream.config import SandboxGatewayConfig
sys.exit(0 if check(SandboxGatewayConfig(preload=())) else 78)
"""


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
from services.sandbox_gateway.check import check
from singlestream.config import SandboxGatewayConfig
sys.exit(0 if check(SandboxGatewayConfig(preload=())) else 78)
"""


@pytest.mark.parametrize(
    ("program", "mend"), [(WITHOUT_NAMESPACES, "seccomp.json"), (LIMITED, "ulimit")], ids=["no namespaces", "limits"]
)
def test_an_unfit_host_is_refused_and_told_why(program: str, mend: str) -> None:
    """A host that grants no user namespaces, as a container's seccomp profile may, or less CPU time than a request may
    ask for: each done to a process of its own.
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == os.EX_CONFIG, done.stdout + done.stderr
    assert "FAIL isolation" in done.stdout
    assert mend in done.stdout
