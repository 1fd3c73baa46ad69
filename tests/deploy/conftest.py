"""The compose files as Compose itself resolves them, and the deployment's own scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def tool(name: str) -> str:
    """Path of a command that the extra ``dev`` installs beside this Python."""
    return str(Path(sys.executable).parent / name)


def resolve(*files: str, env_file: str | None = None) -> dict[str, Any]:
    """``docker-compose config`` of all profiles, without any setting of this shell."""
    arguments = [tool("docker-compose"), "--project-directory", str(ROOT), "--profile", "*"]
    arguments += ["--env-file", env_file or os.devnull]
    for file in files:
        arguments += ["-f", file]
    plain = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    reply = subprocess.run(
        [*arguments, "config", "--format", "json"], cwd=ROOT, env=plain, capture_output=True, text=True
    )
    assert reply.returncode == 0, reply.stderr
    assert "variable is not set" not in reply.stderr
    parsed: dict[str, Any] = json.loads(reply.stdout)
    return parsed


@pytest.fixture(scope="session")
def cpu() -> dict[str, Any]:
    return resolve("docker-compose.yml")


@pytest.fixture(scope="session")
def gpu() -> dict[str, Any]:
    return resolve("docker-compose.yml", "deploy/compose.gpu.yml", env_file=".env.example")
