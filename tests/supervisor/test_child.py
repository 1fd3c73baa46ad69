"""Children are real processes: small shell and Python programs that die in the ways services die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from singlestream.errors import DeadlineExceeded, ServiceError
from singlestream.supervisor.child import Child, Spec
from tests.processes import gone


async def always() -> str | None:
    return None


def spec(*command: str, **fields: object) -> Spec:
    return Spec("service", command, **{"ready": always, **fields})  # type: ignore[arg-type]


async def until(condition: Callable[[], object], deadline_s: float = 20.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_killed_service_is_started_again(tmp_path: Path) -> None:
    child = Child(spec("sleep", "600"), tmp_path)
    task = asyncio.create_task(child.run())
    await until(lambda: child.pid)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.pid not in (None, first))
    assert child.restarts == 1
    assert "supervisor: service ended with code -9; starting it again in 0.1 s" in child.log_path.read_text()
    await child.stop()
    await task
    assert child.pid is None


async def test_what_a_killed_service_leaves_behind_is_killed_too(tmp_path: Path) -> None:
    script = "import os, subprocess, time; subprocess.Popen(['sleep', '601'], start_new_session=True); time.sleep(600)"
    child = Child(spec(sys.executable, "-c", script), tmp_path)
    task = asyncio.create_task(child.run())
    await until(lambda: any(process.name() == "sleep" for process in child._family))
    [orphan] = [process for process in child._family if process.name() == "sleep"]
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: gone(orphan))
    await child.stop()
    await task


async def test_a_service_that_cannot_work_here_is_not_started_again(tmp_path: Path) -> None:
    child = Child(spec("sh", "-c", "echo no isolation here; exit 78"), tmp_path)
    with pytest.raises(ServiceError, match="no isolation here"):
        await child.run()
    assert child.restarts == 0


async def test_completion_is_no_death(tmp_path: Path) -> None:
    child = Child(spec("true", completes=True), tmp_path)
    await child.run()
    assert child.completed


async def test_a_service_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("singlestream.supervisor.child.STOP_S", 0.3)
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    child = Child(spec(sys.executable, "-c", script), tmp_path)
    task = asyncio.create_task(child.run())
    await until(lambda: child.log_path.exists() and child.log_path.read_text().startswith("up"))
    await child.stop()
    await task
    assert child.pid is None


async def test_readiness_names_what_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("singlestream.supervisor.child.SAY_AFTER_S", 0.1)

    async def never() -> str | None:
        return "its first weights"

    child, said = Child(spec("sleep", "600", ready=never, ready_s=0.3), tmp_path), []
    with pytest.raises(DeadlineExceeded, match="its first weights"):
        await child.wait_ready(said.append)
    assert said == ["service: waiting for its first weights"]
