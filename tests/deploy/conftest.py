"""The compose files as Compose itself resolves them, and the deployment's own scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def tool(name: str) -> str:
    """Path of a command that the extra ``dev`` installs beside this Python."""
    return str(Path(sys.executable).parent / name)


def env_file() -> dict[str, str]:
    """The settings of `.env.example`."""
    lines = (line for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def resolve(*files: str, env_file: str = os.devnull, profile: str = "*", **settings: str) -> dict[str, Any]:
    """``docker-compose config`` of all profiles, or of one, without any setting of this shell."""
    arguments = [tool("docker-compose"), "--project-directory", str(ROOT), "--profile", profile, "--env-file", env_file]
    for file in files:
        arguments += ["-f", file]
    plain = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **settings}
    reply = subprocess.run(
        [*arguments, "config", "--format", "json"], cwd=ROOT, env=plain, capture_output=True, text=True
    )
    assert reply.returncode == 0, reply.stderr
    assert "variable is not set" not in reply.stderr
    parsed: dict[str, Any] = json.loads(reply.stdout)
    return parsed


@pytest.fixture(scope="session")
def cpu() -> dict[str, Any]:
    """The main file alone."""
    return resolve("docker-compose.yml")


@pytest.fixture(scope="session")
def cpu_ray() -> dict[str, Any]:
    """Without a GPU, under Ray, and watched."""
    return resolve("docker-compose.yml", "deploy/compose.ray.yml", "deploy/compose.monitoring.yml")


@pytest.fixture(scope="session")
def gpu() -> dict[str, Any]:
    """As `.env.example` lays the files."""
    return resolve(*env_file()["COMPOSE_FILE"].split(":"), env_file=".env.example")


@pytest.fixture(scope="session")
def nodes() -> dict[str, dict[str, Any]]:
    """Several machines: what each part of them runs."""
    files = [name for name in env_file()["COMPOSE_FILE"].split(":") if "monitoring" not in name]
    return {
        part: resolve(
            *files,
            "deploy/compose.nodes.yml",
            env_file=".env.example",
            profile=part,
            HEAD_IP="10.0.0.1",
            NODE_IP="10.0.0.2",
            LEARNER_IP="10.0.0.9",
        )
        for part in ("head", "rollout", "learner")
    }


def wait_for(condition: Callable[[], bool], what: str) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 60, f"waited for {what}"
        time.sleep(0.05)
