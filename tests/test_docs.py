"""What the documents name exists: files, settings, environment variables, commands with their options, endpoints."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from services.rollout.api import create_app
from services.value_store.app import make_app
from singlestream.cli.main import app
from singlestream.config import Config, ValueStoreConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {name: field.annotation for name, field in Config.model_fields.items()}
ELSEWHERE = ("services/X", "singlestream/seccomp.json")
"""A placeholder, and a file's place on a Kubernetes node."""
FOLDERS = "services|singlestream|configs|deploy|docs|tests|benchmarks|scripts|examples"
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@each_document
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    linked = [path.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    named = [ROOT / name for name in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w)(?![\w*{{<]|/)", text)]
    missing = [str(one) for one in linked + named if not (one.exists() or str(one).endswith(ELSEWHERE))]
    assert not missing


@each_document
def test_settings_exist(path: Path) -> None:
    text = path.read_text()
    named = re.findall(rf"`({'|'.join(SECTIONS)})\.([a-z_]+)(?:`| =)", text)
    named += [
        (section.lower(), key.lower().removesuffix("_towards"))  # which deploy/entrypoint understands
        for section, key in re.findall(r"SINGLESTREAM_([A-Z_]+?)__([A-Z_]+)", text)
    ]
    files = {"py", "md", "log", "toml", "yaml", "svg"}
    unknown = [(s, k) for s, k in named if k not in files and k not in SECTIONS[s].model_fields]  # type: ignore[union-attr]
    assert not unknown


def commands(text: str) -> Iterator[list[str]]:
    """Every command line of `singlestream` in a document, as words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(singlestream [^`]+)`", text.replace("\n", " "))
    for line in lines:
        if line.startswith("singlestream ") and "…" not in line:
            yield shlex.split(line, comments=True)[1:]


@each_document
def test_commands_and_their_options_exist(path: Path) -> None:
    for words in commands(path.read_text()):
        command: Any = typer.main.get_command(app)
        rest = list(words)
        while isinstance(command, click.Group) or hasattr(command, "commands"):
            if not rest or rest[0].startswith("-"):
                break
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        known = {"--help"} | {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, words


def test_endpoints_exist() -> None:
    store = make_app(None, ValueStoreConfig())  # type: ignore[arg-type]
    rollout = create_app(lambda: None)  # type: ignore[arg-type, return-value]
    paths = {*store.openapi()["paths"], *rollout.openapi()["paths"], "/v1/openapi.json", "/v1/execute"}
    known = [re.compile(re.sub(r"\{\w+\}", r"(?:\\{\\w+\\}|[0-9a-f]{16})", path) + r"/?") for path in paths]
    orders = re.compile(r"[?&]order=(\w+)")
    allowed = {"id", "value", "weight", "visits", "n_eff", "updated"}
    for path in DOCUMENTS:
        text = path.read_text()
        for named in re.findall(r"/v1/[\w/{}]+(?:\.json)?", text):
            assert any(one.fullmatch(named) for one in known), (path.name, named)
        assert set(orders.findall(text)) <= allowed, path.name


def test_the_readme_says_how_long_its_five_files_are() -> None:
    rows = re.findall(r"^\| \[(\S+\.py)\]\(\S+\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 5
    for name, lines in rows:
        length = len((ROOT / name).read_text().splitlines())
        assert abs(length - int(lines)) <= 0.15 * length, f"{name} has {length} lines"


def test_the_code_of_the_own_task_page_is_the_example() -> None:
    code = (ROOT / "examples" / "own_task.py").read_text().splitlines()
    page = (ROOT / "docs" / "own_task.md").read_text()
    shown = [line for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]
    assert len(shown) > 15
    assert set(shown) <= set(code)
