"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from singlestream.config import load_config

ROOT = Path(__file__).parent.parent
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if (path / "__init__.py").exists())
HEAVY = ("torch", "vllm", "ray", "transformers")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, function-local imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_there_are_four_services() -> None:
    assert SERVICES == ["learner", "rollout", "sandbox_gateway", "value_store"]


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_imports_another(service: str) -> None:
    others = [f"services.{other}" for other in SERVICES if other != service]
    for path in (ROOT / "services" / service).rglob("*.py"):
        for module in imported(path):
            assert not any(module == other or module.startswith(other + ".") for other in others), (path, module)


def test_the_shared_package_imports_no_service_and_nothing_heavy() -> None:
    for path in (ROOT / "singlestream").rglob("*.py"):
        for module in imported(path):
            assert module.split(".")[0] not in ("services", *HEAVY), (path, module)


def test_no_file_has_a_name_that_says_nothing() -> None:
    bad = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
    for folder in ("singlestream", "services", "benchmarks", "tests"):
        assert not bad & {path.name for path in (ROOT / folder).rglob("*.py")}


def test_importing_singlestream_loads_nothing_heavy() -> None:
    code = (
        "import sys, pkgutil, importlib, singlestream\n"
        "skip = ('singlestream.demo',)\n"
        "for m in pkgutil.walk_packages(singlestream.__path__, 'singlestream.'):\n"
        "    if not m.name.startswith(skip): importlib.import_module(m.name)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    reply = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert reply.stdout.strip() == "[]"


def test_help_loads_only_what_it_shows() -> None:
    """Its speed is what it imports: a timed assertion would depend on the machine."""
    code = (
        "import sys; from singlestream.cli.main import app\n"
        f"print([m for m in {(*HEAVY, 'numpy', 'redis', 'httpx', 'matplotlib', 'pydantic')!r} if m in sys.modules])"
    )
    reply = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert reply.stdout.strip() == "[]"
    help_text = subprocess.run(
        [sys.executable, "-m", "singlestream.cli.main", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert "Asynchronous reinforcement learning" in help_text


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.run.total_steps > 0


def test_no_pickle_on_any_wire() -> None:
    for folder in ("singlestream", "services"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {"pickle", "cloudpickle", "dill", "shelve"} & set(imported(path)), path
