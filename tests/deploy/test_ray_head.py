"""``ray-head``: who is started, told and ended when. A small program stands for Ray, which takes seconds to start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from singlestream.config import load_config
from singlestream.errors import ConfigError, DeadlineExceeded
from tests.deploy.conftest import DEPLOY, ROOT, wait_for
from tests.ports import free_port

RAY = """#!/usr/bin/env python3
import os, signal, socket, sys
events = open(os.environ["EVENTS"], "a", buffering=1)
if os.environ.get("RAY_FAILS"):
    sys.exit(3)
options = dict(one.split("=") for one in sys.argv if "=" in one)
ending = {signal.SIGTERM, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, ending)
print("ray", *sys.argv[1:3], file=events)
server = socket.create_server((options["--node-ip-address"], int(options["--port"])))
signal.sigwait(ending)
print("ray ends", file=events)
"""
COMMAND = """
trap 'echo told >>"$EVENTS"; sleep 0.2; echo command ends >>"$EVENTS"; exit 0' TERM
echo "command $SINGLESTREAM_ROLLOUT__RAY_ADDRESS" >>"$EVENTS"
while :; do sleep 0.05; done
"""


class Head:
    """A running ``ray-head`` and what has happened in it."""

    def __init__(self, folder: Path) -> None:
        self.events_file = folder / "events"
        self.events_file.touch()
        (folder / "python3").symlink_to(sys.executable)  # the script takes the `ray` beside its interpreter
        (folder / "ray").write_text(RAY)
        (folder / "ray").chmod(0o755)
        self.port = free_port()
        self.env = {"PATH": f"{folder}:/usr/bin:/bin", "EVENTS": str(self.events_file), "RAY_GCS_PORT": str(self.port)}
        self.process: subprocess.Popen[str] | None = None

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [str(DEPLOY / "ray-head"), "sh", "-c", command],
            env={**self.env, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    @property
    def events(self) -> list[str]:
        return self.events_file.read_text().splitlines()

    def begins(self) -> None:
        wait_for(lambda: len(self.events) == 2, "Ray and the command")
        assert self.events == ["ray start --head", f"command 127.0.0.1:{self.port}"]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    running = Head(tmp_path)
    yield running
    assert running.process is not None
    running.process.kill()
    running.process.wait()
    assert running.process.stderr is not None
    running.process.stderr.close()


def test_a_stop_reaches_the_command_first_and_then_ray(head: Head) -> None:
    process = head.start(COMMAND)
    head.begins()
    process.terminate()
    assert process.wait(60) == 0
    assert head.events[2:] == ["told", "command ends", "ray ends"]


def said(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.read()


def test_where_ray_ends_the_command_is_told(head: Head) -> None:
    process = head.start(COMMAND)
    head.begins()
    [ray, _] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ray), signal.SIGUSR1)
    assert process.wait(60) == 1
    assert head.events[2:] == ["ray ends", "told", "command ends"]
    assert "ended by itself: Ray 0" in said(process)


def test_where_the_command_ends_ray_does_too(head: Head) -> None:
    process = head.start('echo "command $SINGLESTREAM_ROLLOUT__RAY_ADDRESS" >>"$EVENTS"; exit 5')
    assert process.wait(60) == 5
    assert head.events[2:] == ["ray ends"]
    assert "the command 5" in said(process)


def test_a_ray_that_does_not_start_ends_it(head: Head) -> None:
    process = head.start(COMMAND, RAY_FAILS="1")
    assert process.wait(60) == os.EX_TEMPFAIL
    assert head.events == []
    assert "Ray does not listen on 127.0.0.1:" in said(process)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what Ray's imports warn of is not ours
def test_its_command_ends_where_no_node_with_a_slot_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head has neither model nor weights: a replica that Serve placed there would never start."""
    from services.rollout import serve

    config = load_config(ROOT / "configs" / "demo-cpu.toml")
    joined = config.rollout.model_copy(update={"ray_address": "head:6380", "engine_start_timeout_s": 0.1})
    monkeypatch.setattr(serve.ray, "cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(DeadlineExceeded, match="a node of the cluster with the resource rollout_slot"):
        serve.application(config.model_copy(update={"rollout": joined}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_open_address_without_a_token_is_refused_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from services.rollout import serve

    monkeypatch.setenv("SINGLESTREAM_CONFIG", str(ROOT / "configs" / "demo-cpu.toml"))
    monkeypatch.setenv("SINGLESTREAM_ROLLOUT__HOST", "10.0.0.5")
    with pytest.raises(ConfigError, match=r"set rollout\.token"):
        serve.from_environment({})
