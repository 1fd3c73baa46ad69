"""Every attack is contained by the running gateway, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.sandbox_gateway import attacks_on_resources as resources
from tests.services.sandbox_gateway import attacks_on_the_host as the_host
from tests.services.sandbox_gateway.attack import Attack
from tests.services.sandbox_gateway.gateway import SECRET, Gateway

pytestmark = pytest.mark.timeout(400)

ATTACKS = (
    *resources.TIME, *resources.PROCESSES, *resources.MEMORY, *resources.OUTPUT,
    *the_host.FILES, *the_host.NETWORK, *the_host.KERNEL, *the_host.ISOLATION,
)  # fmt: skip

CLEAN = """
import builtins, json, math, os, sys, threading
import numpy, sympy
facts = {
    "files": os.listdir("/tmp"),
    "threads": threading.active_count(),
    "pi": math.pi, "sympy": str(sympy.pi), "len": len("abc"), "dumps": json.dumps([1]), "sum": int(numpy.sum([1, 2])),
    "names": sorted(set(globals()) - {"builtins", "json", "math", "os", "sys", "threading", "numpy", "sympy"}),
}
print(json.dumps(facts))
"""
CLEAN_FACTS = {
    "files": [],
    "threads": 1,
    "pi": 3.141592653589793,
    "sympy": "pi",
    "len": 3,
    "dumps": "[1]",
    "sum": 3,
    "names": ["__builtins__", "__doc__", "__file__", "__loader__", "__name__", "__package__", "__spec__"],
}


MAX_GROWTH_BYTES = 16 << 20
"""Gateway and zygotes together: the first attacks fill caches."""


class CanaryServers:
    """What no run may reach: a TCP port and an abstract Unix socket.

    Args:
        host: address at which the gateway sees the host.
    """

    def __init__(self, host: str) -> None:
        self.tcp = socket.create_server((host, 0))
        self.tcp.setblocking(False)
        self.port = self.tcp.getsockname()[1]
        self.abstract_name = f"@sandbox-canary-{self.port}"
        self.abstract = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.abstract.bind(self.abstract_name.replace("@", "\0"))
        self.abstract.setblocking(False)

    def assert_not_reached(self) -> None:
        for receive in (self.tcp.accept, lambda: self.abstract.recv(100)):
            with pytest.raises(BlockingIOError):
                receive()


@pytest.fixture(scope="module")
def servers(gateway: Gateway) -> Iterator[CanaryServers]:
    started = CanaryServers(gateway.host)
    yield started
    started.tcp.close()
    started.abstract.close()


@pytest.fixture(scope="module")
def at_rest(gateway: Gateway) -> tuple[int, int]:
    return gateway.footprint()


@pytest.fixture(scope="module")
def memory_before(gateway: Gateway, at_rest: tuple[int, int]) -> int:
    return gateway.memory_bytes()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
@pytest.mark.usefixtures("memory_before")
def test_contained(gateway: Gateway, servers: CanaryServers, at_rest: tuple[int, int], attack: Attack) -> None:
    code = attack.code.replace("CANARY_PORT", str(servers.port)).replace("CANARY_ABSTRACT", servers.abstract_name)
    code = code.replace("SECRET_FILE", gateway.secret_path).replace("CANARY_HOST", gateway.host)
    result = gateway.run(code, **{"timeout_s": 20, **attack.request})
    if result["status"] == "timeout" and attack.stdout and not result["stdout"]:
        result = gateway.run(
            code, **{**attack.request, "timeout_s": 20}
        )  # a busy machine: it had not come to its print

    assert result["status"] in attack.statuses, result
    if attack.stdout is not None:
        assert result["stdout"] == attack.stdout, result
    assert SECRET not in json.dumps(result)
    servers.assert_not_reached()
    gateway.wait_idle(at_rest)
    assert gateway.http.get("/readyz").status_code == 200
    after = gateway.run(CLEAN, timeout_s=30)
    assert (after["status"], json.loads(after["stdout"] or "null")) == ("ok", CLEAN_FACTS), after


def test_there_are_enough_of_them() -> None:
    assert len(ATTACKS) >= 45
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


def test_nothing_is_left_of_them(gateway: Gateway, memory_before: int) -> None:
    """Runs after them all, which went through the zygotes that the gateway started with."""
    assert 'reason="died"' not in gateway.http.get("/metrics").text
    assert gateway.memory_bytes() - memory_before < MAX_GROWTH_BYTES


def test_the_canary_was_there_to_reach(gateway: Gateway, servers: CanaryServers) -> None:
    """From the gateway's own network it can be; only the runs could not."""
    program = f"import socket; socket.create_connection(({gateway.host!r}, {servers.port}), 20)"
    subprocess.run([*gateway.beside, sys.executable, "-c", program], check=True, timeout=60)
    servers.tcp.accept()[0].close()


def test_the_secret_was_there_to_read(gateway: Gateway) -> None:
    """The attack tests would prove nothing if the gateway itself had no secret."""
    assert SECRET in Path(f"/proc/{gateway.process.pid}/environ").read_text()
    assert SECRET in gateway.secret_file.read_text()
    assert gateway.secret_file.stat().st_mode & 0o004
