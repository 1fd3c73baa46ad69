from __future__ import annotations

from pathlib import Path

import pytest

from singlestream.config import load_config
from singlestream.errors import ConfigError

MINIMAL = '[run]\nname = "r"\nmodel = "m"\ntotal_steps = 3\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_defaults_follow_the_design(file: Path) -> None:
    config = load_config(file)
    assert (config.run.train_batch_size, config.run.max_staleness, config.run.staleness_bound) == (256, 4, 8)
    assert (config.learner.clip_low, config.learner.clip_high, config.learner.dual_clip) == (0.2, 0.28, 10.0)
    assert config.value_store.host == config.rollout.host == config.sandbox_gateway.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[learner]\nlerning_rate = 1\n", "learner.lerning_rate"),
        ("[learner]\nlr = -1\n", "learner.lr"),
        ("[lerner]\nlr = 1\n", "lerner"),
        ("[value_store]\nrho_min = 0.97\n", "value_store"),
        ('[learner]\nold = "behaviour"\n', "truncation"),
        ("[rollout]\nmax_model_tokens = 64\nmax_response_tokens = 64\n", "max_response_tokens"),
        ('[learner]\nadvantage = "grpo"\n', "group_size"),
        ("[value_store]\ngroup_size = 8\n", "grpo"),
        ('[learner]\nadvantage = "grpo"\n[value_store]\ngroup_size = 3\n', "train_batch_size 256 is no multiple"),
        ("[run]\n", "TOML"),
    ],
)
def test_a_wrong_setting_is_named(file: Path, text: str, key: str) -> None:
    file.write_text(MINIMAL + text)
    with pytest.raises(ConfigError, match=key):
        load_config(file)


def test_truncation_can_be_switched_off_in_a_file(file: Path) -> None:
    file.write_text(MINIMAL + '[learner]\ntruncation = 0\nold = "behaviour"\n')
    assert load_config(file).learner.truncation is None


def test_kl_retention_keeps_every_prompts_response(file: Path) -> None:
    assert load_config(file).anchor_share == 0.05
    file.write_text(MINIMAL + '[value_store]\nretention = "kl"\n')
    assert load_config(file).anchor_share == 1.0


def test_the_environment_wins_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINGLESTREAM_RUN__TOTAL_STEPS", "7")
    monkeypatch.setenv("SINGLESTREAM_VALUE_STORE__READ_TOKEN", "secret")
    monkeypatch.setenv("SINGLESTREAM_CONFIG", str(file))
    config = load_config()
    assert config.run.total_steps == 7
    assert config.run.name == "r"
    assert "secret" not in repr(config)


def test_no_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SINGLESTREAM_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="SINGLESTREAM_CONFIG"):
        load_config()
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.toml")
