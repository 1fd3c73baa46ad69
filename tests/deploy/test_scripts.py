"""The deployment's scripts, run as containers run them, without containers and without GPUs."""

from __future__ import annotations

import fcntl
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.conftest import DEPLOY, wait_for

Hold = Callable[..., tuple[subprocess.Popen[str], str]]
"""Starts a command that claims GPUs and keeps them; gives it and the indices that it saw."""
SCRIPTS = {
    path: path.read_text().partition("\n")[0]
    for path in DEPLOY.rglob("*")
    if path.is_file() and path.stat().st_mode & 0o100
}
SHELL_SCRIPTS = [path for path, first in SCRIPTS.items() if first in ("#!/bin/sh", "#!/usr/bin/env bash")]
PYTHON_SCRIPTS = [path for path, first in SCRIPTS.items() if first == "#!/usr/bin/env python3"]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    return subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(path: Path) -> None:
    shell = SCRIPTS[path].rpartition("/")[2].split()[-1]
    reply = run(shell, "-n", path)
    assert reply.returncode == 0, reply.stderr


@pytest.mark.parametrize("path", PYTHON_SCRIPTS, ids=lambda path: path.name)
def test_python_syntax(path: Path) -> None:
    compile(path.read_text(), path, "exec")


class TestEntrypoint:
    SHOW = (sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))")

    def test_a_file_becomes_the_setting_and_its_own_variable_goes(self, tmp_path: Path) -> None:
        secret = tmp_path / "url"
        secret.write_text("redis://rollout:s3cret@redis:6379/0\n")
        reply = run(DEPLOY / "entrypoint", *self.SHOW, SINGLESTREAM_RUN__REDIS_URL_FILE=str(secret))
        seen = json.loads(reply.stdout)
        assert seen["SINGLESTREAM_RUN__REDIS_URL"] == "redis://rollout:s3cret@redis:6379/0"
        assert "SINGLESTREAM_RUN__REDIS_URL_FILE" not in seen

    def test_a_missing_or_empty_file_is_named(self, tmp_path: Path) -> None:
        reply = run(DEPLOY / "entrypoint", "true", SINGLESTREAM_RUN__REDIS_URL_FILE=str(tmp_path / "none"))
        assert reply.returncode == 78
        assert "SINGLESTREAM_RUN__REDIS_URL_FILE: cannot read" in reply.stderr
        (tmp_path / "empty").touch()
        reply = run(DEPLOY / "entrypoint", "true", SINGLESTREAM_RUN__REDIS_URL_FILE=str(tmp_path / "empty"))
        assert reply.returncode == 78

    def test_it_finds_its_own_address_on_the_way_to_a_peer(self, tmp_path: Path) -> None:
        settings = {"SINGLESTREAM_ROLLOUT__HOST_TOWARDS": "127.0.0.1", "TMPDIR": str(tmp_path)}
        reply = run(DEPLOY / "entrypoint", *self.SHOW, **settings)
        assert json.loads(reply.stdout)["SINGLESTREAM_ROLLOUT__HOST"] == "127.0.0.1"
        assert (tmp_path / "listening_on").read_text() == "127.0.0.1\n", "the health check asks there"

    def test_a_peer_that_is_not_there_ends_it_at_the_deadline(self) -> None:
        reply = run(
            DEPLOY / "entrypoint",
            "true",
            SINGLESTREAM_ROLLOUT__HOST_TOWARDS="nowhere.invalid",
            SINGLESTREAM_ENTRYPOINT_DEADLINE_S="0.1",
        )
        assert reply.returncode == 78
        assert "no address for nowhere.invalid" in reply.stderr

    def test_gloo_and_nccl_get_the_interface_of_an_address(self) -> None:
        reply = run(DEPLOY / "entrypoint", *self.SHOW, SINGLESTREAM_INTERFACE_WITH="127.0.0.1", NCCL_SOCKET_IFNAME="")
        seen = json.loads(reply.stdout)
        assert (seen["GLOO_SOCKET_IFNAME"], seen["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
        given = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "^docker"}
        reply = run(DEPLOY / "entrypoint", *self.SHOW, SINGLESTREAM_INTERFACE_WITH="127.0.0.1", **given)
        assert json.loads(reply.stdout).items() >= given.items()
        reply = run(DEPLOY / "entrypoint", "true", SINGLESTREAM_INTERFACE_WITH="192.0.2.1")
        assert reply.returncode == 78
        assert "no interface has the address 192.0.2.1" in reply.stderr


class TestGpuClaims:
    """Replicas share the GPUs of their service out by locks."""

    SHOW = (sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))")
    HOLD = (
        sys.executable,
        "-c",
        "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(600)",
    )

    @pytest.fixture
    def gpus(self, tmp_path: Path) -> dict[str, str]:
        """A container with four GPUs, not the first ones of its host."""
        locks, devices = tmp_path / "locks", tmp_path / "dev"
        locks.mkdir()
        devices.mkdir()
        for name in ("nvidia2", "nvidia3", "nvidia4", "nvidia5", "nvidiactl", "nvidia-uvm"):
            (devices / name).touch()
        return {
            "SINGLESTREAM_GPU_LOCKS": str(locks),
            "SINGLESTREAM_GPU_DEVICES": str(devices),
            "SINGLESTREAM_GPU_WAIT_S": "0",
        }

    @pytest.fixture
    def hold(self, gpus: dict[str, str]) -> Iterator[Hold]:
        started = []

        def start(**more: str) -> tuple[subprocess.Popen[str], str]:
            process = subprocess.Popen(
                [str(DEPLOY / "entrypoint-rollout"), *self.HOLD],
                env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **gpus, **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            started.append(process)
            assert process.stdout is not None
            return process, process.stdout.readline().strip()

        yield start
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def test_without_gpus_the_command_just_runs(self, tmp_path: Path) -> None:
        reply = run(DEPLOY / "entrypoint-rollout", *self.SHOW, SINGLESTREAM_GPU_DEVICES=str(tmp_path))
        assert reply.stdout.strip() == "None"

    def test_replicas_take_different_gpus(self, hold: Hold) -> None:
        taken = [hold()[1] for _ in range(4)]
        assert sorted(taken) == ["0", "1", "2", "3"]

    def test_tensor_parallel_takes_several_or_none(self, hold: Hold, gpus: dict[str, str]) -> None:
        two = {"SINGLESTREAM_ROLLOUT__TENSOR_PARALLEL": "2"}
        assert hold()[1] == "0"
        assert hold(**two)[1] == "1,2"
        reply = run(DEPLOY / "entrypoint-rollout", *self.SHOW, **gpus, **two)
        assert reply.returncode == os.EX_TEMPFAIL
        assert "for 2 free of the GPUs [0, 1, 2, 3]" in reply.stderr
        assert hold()[1] == "3", "the failed claim must hold nothing"

    def test_a_container_of_several_replicas_takes_as_many(self, hold: Hold) -> None:
        assert hold(SINGLESTREAM_NODE_SLOTS="3")[1] == "0,1,2"

    def test_a_killed_replica_gives_its_gpus_back(self, hold: Hold) -> None:
        processes = [hold()[0] for _ in range(4)]
        processes[2].send_signal(signal.SIGKILL)
        processes[2].wait()
        assert hold()[1] == "2"

    def test_it_waits_for_one_that_is_ending(self, gpus: dict[str, str]) -> None:
        lock = os.open(Path(gpus["SINGLESTREAM_GPU_LOCKS"]) / "0", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        release = threading.Timer(0.3, os.close, [lock])
        release.start()
        reply = run(
            DEPLOY / "entrypoint-rollout",
            *self.SHOW,
            **{**gpus, "SINGLESTREAM_GPUS": "0", "SINGLESTREAM_GPU_WAIT_S": "60"},
        )
        release.join()
        assert reply.stdout.strip() == "0"

    def test_too_few_gpus_are_a_wrong_setting(self, gpus: dict[str, str]) -> None:
        reply = run(DEPLOY / "entrypoint-rollout", *self.SHOW, **gpus, SINGLESTREAM_ROLLOUT__TENSOR_PARALLEL="8")
        assert reply.returncode == os.EX_CONFIG
        assert "8 GPUs are needed" in reply.stderr


class TestHealthcheck:
    @pytest.fixture
    def service(self) -> Iterator[dict[str, int]]:
        """A service whose answers the test chooses."""
        answers = {"/healthz": 200, "/readyz": 503}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(answers[self.path])
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        answers["port"] = server.server_address[1]
        yield answers
        server.shutdown()
        server.server_close()
        thread.join()

    def check(self, port: int, folder: Path, parent: int = 0) -> int:
        return run(
            DEPLOY / "healthcheck",
            str(port),
            TMPDIR=str(folder),
            SINGLESTREAM_HEALTH_PARENT=str(parent),
            SINGLESTREAM_HUNG_AFTER="2",
        ).returncode

    def test_a_hung_service_is_ended_only_after_it_was_ready(self, service: dict[str, int], tmp_path: Path) -> None:
        init = subprocess.Popen(["sh", "-c", "sleep 600 & echo started; wait"], stdout=subprocess.PIPE, text=True)
        try:
            assert init.stdout is not None
            init.stdout.readline()
            port = service["port"]
            assert self.check(port, tmp_path, init.pid) == 0
            service["/healthz"] = 503
            assert [self.check(port, tmp_path, init.pid) for _ in range(3)] == [1, 1, 1]
            assert init.poll() is None, "loading is no hang"
            service["/healthz"] = service["/readyz"] = 200
            assert self.check(port, tmp_path, init.pid) == 0
            service["/healthz"] = 503
            assert self.check(port, tmp_path, init.pid) == 1
            assert init.poll() is None, "one failure is no hang"
            assert self.check(port, tmp_path, init.pid) == 1
            init.wait(60)
        finally:
            init.kill()
            init.wait()
            init.stdout.close()

    def test_other_paths_may_be_asked_for(self, service: dict[str, int], tmp_path: Path) -> None:
        service["/agent"] = 200
        reply = run(DEPLOY / "healthcheck", str(service["port"]), "/agent", "/agent", TMPDIR=str(tmp_path))
        assert reply.returncode == 0
        assert (tmp_path / "health").read_text() == "0", "it was ready: now a failure counts"

    def test_nobody_there(self, tmp_path: Path) -> None:
        assert self.check(1, tmp_path) == 1


class TestStayWhenDone:
    def test_a_failure_ends_with_its_code(self) -> None:
        assert run(DEPLOY / "stay_when_done", "sh", "-c", "exit 3").returncode == 3

    def test_it_stays_after_success_and_ends_on_sigterm(self, tmp_path: Path) -> None:
        env = {**os.environ, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen([str(DEPLOY / "stay_when_done"), "true"], stderr=subprocess.PIPE, text=True, env=env)
        assert process.stderr is not None
        assert "the command is done" in process.stderr.readline()
        assert process.poll() is None
        process.terminate()
        process.wait(60)
        process.stderr.close()
        reply = run(DEPLOY / "healthcheck", "1", TMPDIR=str(tmp_path))
        assert (reply.returncode, reply.stdout) == (0, "finished\n"), "nothing answers any more, and nothing should"

    def test_sigterm_reaches_the_command(self, tmp_path: Path) -> None:
        mark, ready = tmp_path / "terminated", tmp_path / "ready"
        command = f"trap 'touch {mark}; exit 0' TERM; touch {ready}; while :; do sleep 0.05; done"
        process = subprocess.Popen([str(DEPLOY / "stay_when_done"), "sh", "-c", command])
        wait_for(ready.exists, "the command")
        process.terminate()
        assert process.wait(60) == 0
        assert mark.exists()


def test_requirements_are_those_of_the_named_extras(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["a"]\n[project.optional-dependencies]\nx = ["b==1"]\ny = ["c"]\n')
    assert run(DEPLOY / "requirements_of", project, "x").stdout.split() == ["a", "b==1"]
    assert run(DEPLOY / "requirements_of", project, "z").returncode == 1


def test_init_makes_each_service_its_secrets_once(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; from pathlib import Path\n"
        f"scope = runpy.run_path({str(DEPLOY / 'init')!r}, run_name='init')\n"
        f"root = Path({str(tmp_path)!r})\n"
        "for name in 'master redis value_store rollout learner tools prometheus grafana'.split():\n"
        "    (root / name).mkdir(exist_ok=True)\n"
        "scope['make_secrets'](root, '--rotate' in sys.argv)"
    )

    def snapshot(*arguments: str) -> dict[str, str]:
        reply = run(sys.executable, "-c", code, *arguments)
        assert reply.returncode == 0, reply.stderr
        return {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    first = snapshot()
    assert {name for name in first if name.startswith("rollout/")} == {
        "rollout/redis_url",
        "rollout/rollout_token",
        "rollout/weights_token",
        "rollout/ray_token",
    }
    assert {name for name in first if name.startswith("learner/")} == {"learner/redis_url", "learner/weights_token"}
    assert {name for name in first if name.startswith("prometheus/")} == {"prometheus/read_token"}
    assert first["value_store/write_token"] == first["tools/write_token"] != first["value_store/read_token"]
    assert all(len(first[f"master/{name}"]) == 64 for name in ("read_token", "write_token", "redis_rollout"))
    assert first["master/redis_rollout"] not in first["redis/users.acl"], "Redis gets hashes"
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.rglob("*") if path.is_file())
    assert snapshot() == first
    rotated = snapshot("--rotate")
    assert not {rotated[name] for name in rotated if name.startswith("master/")} & set(first.values())
