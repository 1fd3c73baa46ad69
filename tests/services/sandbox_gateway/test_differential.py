"""The zygote against its slow twin: a fresh Python in a fresh bubblewrap must print the same and end the same."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.sandbox_gateway.view import DEVICES, find_interpreter
from tests.services.sandbox_gateway.gateway import Gateway
from tests.services.sandbox_gateway.snippets import ECHOED, LINES, SNIPPETS, Snippet

pytestmark = pytest.mark.timeout(400)

TWIN_DEADLINE_S = 60


def run_in_twin(snippet: Snippet, folder: Path) -> tuple[int, str]:
    """Exit code (minus the signal's number, if one ended it) and standard output of a fresh Python in bubblewrap."""
    program = folder / f"{abs(hash(snippet.name))}.py"
    program.write_text(snippet.code)
    python = find_interpreter(sys.executable)
    command = [
        "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--clearenv",
    ]
    for name in ("/usr/lib", "/usr/lib64"):
        if os.path.isdir(name):
            command += ["--ro-bind", name, name, "--symlink", name[1:], name.removeprefix("/usr")]
    for name in python.folders:
        command += ["--ro-bind", name, name]
    for name in DEVICES:
        command += ["--dev-bind", name, name]
    for name, value in {"HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}.items():
        command += ["--setenv", name, value]
    command += ["--tmpfs", "/tmp", "--ro-bind", str(program), "/tmp/main.py", "--chdir", "/tmp"]
    command += ["--", python.executable, "-B", "/tmp/main.py"]
    done = subprocess.run(command, input=snippet.stdin.encode(), capture_output=True, timeout=TWIN_DEADLINE_S)
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    return code, done.stdout.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def twin_answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """All twins, two at a time."""
    folder = tmp_path_factory.mktemp("twin")
    os.chmod(folder, 0o755)  # noqa: S103  bubblewrap must be able to read it as another user
    with ThreadPoolExecutor(2) as workers:
        answers = list(workers.map(lambda snippet: run_in_twin(snippet, folder), SNIPPETS))
    return {snippet.name: answer for snippet, answer in zip(SNIPPETS, answers, strict=True)}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_same_as_a_fresh_python(gateway: Gateway, twin_answers: dict[str, tuple[int, str]], snippet: Snippet) -> None:
    exit_code, stdout = twin_answers[snippet.name]
    result = gateway.run(snippet.code, stdin=snippet.stdin, timeout_s=30, **snippet.request)
    code = 128 + result["signal"] if result["signal"] else result["exit_code"]
    assert (code, result["stdout"]) == (exit_code, stdout), result
    assert result["status"] == ("killed" if result["signal"] else "ok" if exit_code == 0 else "error")


@pytest.mark.parametrize(("code", "shown"), ECHOED)
def test_last_expression_is_shown_as_the_interpreter_does(gateway: Gateway, code: str, shown: str) -> None:
    result = gateway.run(code, echo_last_expr=True, timeout_s=30)
    assert (result["status"], result["stdout"]) == ("ok", shown), result
    silent = gateway.run(code, timeout_s=30)
    assert silent["stdout"] == ("1\n" if "print(1)" in code else "")


@pytest.mark.parametrize(("code", "kind", "line"), LINES)
def test_exceptions_name_their_line(gateway: Gateway, code: str, kind: str, line: int) -> None:
    for echo in (False, True):
        result = gateway.run(code, echo_last_expr=echo, timeout_s=30)
        assert result["status"] == "error"
        assert (result["error"]["type"], result["error"]["line"]) == (kind, line), result
        assert f'File "main.py", line {line}' in result["stderr"]


def test_there_are_enough_of_them() -> None:
    assert len(SNIPPETS) >= 60
    assert len({snippet.name for snippet in SNIPPETS}) == len(SNIPPETS)
