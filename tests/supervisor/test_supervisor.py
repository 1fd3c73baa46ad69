"""What a run must have to itself: its folders, its ports."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from singlestream.config import Config, load_config
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.errors import ConfigError
from singlestream.supervisor.supervisor import Supervisor, check_ports, check_room, claim
from tests.ports import free_port


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file = tmp_path / "run.toml"
    file.write_text(
        f'[run]\nname = "mine"\nmodel = "{tmp_path}/model"\ntotal_steps = 1\n'
        f'runs_dir = "{tmp_path}/runs"\nweights_dir = "{tmp_path}"\n'
        f"[value_store]\nport = {free_port()}\n[rollout]\nport = {free_port()}\n"
        f"[sandbox_gateway]\nport = {free_port()}\n[learner]\nmetrics_port = {free_port()}\n"
    )
    return file


@pytest.fixture
def config(path: Path) -> Config:
    return load_config(path)


async def test_a_second_run_of_one_name_is_refused_and_touches_nothing(config: Config, path: Path) -> None:
    with contextlib.ExitStack() as held:
        claim(config, held)
        kept = [config.run.dir / "steps.jsonl", config.run.weights_path / "v1.weights"]
        for file in kept:
            file.write_text("the first run's")
        with pytest.raises(ConfigError, match="already up"):
            async with Supervisor(config, path, fresh=True):
                pass
        assert all(file.exists() for file in kept)
    with contextlib.ExitStack() as held:
        claim(config, held)


async def test_another_folder_does_not_share_the_weights(config: Config, path: Path, tmp_path: Path) -> None:
    other = config.model_copy(update={"run": config.run.model_copy(update={"runs_dir": tmp_path / "elsewhere"})})
    with contextlib.ExitStack() as held:
        claim(config, held)
        with pytest.raises(ConfigError, match="singlestream-mine"):
            claim(other, held)


def test_a_taken_port_is_named_with_the_variable_that_changes_it(config: Config) -> None:
    check_ports(config)
    port = config.rollout.port
    told = pytest.raises(ConfigError, match=rf"127.0.0.1:{port}.*SINGLESTREAM_ROLLOUT__PORT")
    with socket.create_server(("127.0.0.1", port)), told:
        check_ports(config)


def test_a_full_disk_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path)
    monkeypatch.setattr("singlestream.supervisor.supervisor.LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match="MiB are free on its disk"):
        check_room(tmp_path)


def test_a_path_too_long_for_redis_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose a shorter"):
        EmbeddedRedis(tmp_path / ("a" * 108)).command()
