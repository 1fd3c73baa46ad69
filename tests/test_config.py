from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from services.sandbox_gateway.settings import load_settings
from singlestream import config
from singlestream.config import (
    Config,
    LearnerConfig,
    RolloutConfig,
    RunConfig,
    SandboxGatewayConfig,
    ValueStoreConfig,
    load_config,
)
from singlestream.errors import ConfigError
from singlestream.validation import misnamed_variables

ROOT = Path(__file__).parents[1]
MINIMAL = '[run]\nname = "r"\nmodel = "m"\ntotal_steps = 3\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def test_defaults_follow_the_design(file: Path) -> None:
    loaded = load_config(file)
    assert (loaded.run.train_batch_size, loaded.run.max_staleness, loaded.run.staleness_bound) == (256, 4, 8)
    assert (loaded.learner.clip_low, loaded.learner.clip_high, loaded.learner.dual_clip) == (0.2, 0.28, 10.0)
    assert loaded.value_store.host == loaded.rollout.host == loaded.sandbox_gateway.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[learner]\nlerning_rate = 1\n", "learner.lerning_rate: no such setting"),
        ("[learner]\nmicro_batch_token = 1\n", "do you mean micro_batch_tokens"),
        ("[learner]\nlr = -1\n", "learner.lr"),
        ("[lerner]\nlr = 1\n", "lerner: no such setting; do you mean learner"),
        ("[value_store]\nrho_min = 0.97\n", "value_store"),
        ('[learner]\nold = "behaviour"\n', "truncation"),
        ("[rollout]\nmax_model_tokens = 64\nmax_response_tokens = 64\n", "max_response_tokens"),
        ('[learner]\nadvantage = "grpo"\n', "group_size"),
        ("[value_store]\ngroup_size = 8\n", "grpo"),
        ('[learner]\nadvantage = "grpo"\n[value_store]\ngroup_size = 3\n', "train_batch_size 256 is no multiple"),
        ("[rollout]\ntool_timeout_s = 20.0\n[sandbox_gateway]\nmax_timeout_s = 10.0\n", "every call would be refused"),
        ("[learner]\nbetas = [0.9, 1.0]\n", "learner.betas.1"),
        ("[learner]\nratio_mask = inf\n", "learner.ratio_mask"),
        ("[value_store]\nrho_event = nan\n", "value_store.rho_event"),
        ('redis_url = "http://127.0.0.1:6379"\n', "run.redis_url"),
        ("[run]\n", "TOML"),
    ],
)
def test_a_wrong_setting_is_named(file: Path, text: str, key: str) -> None:
    file.write_text(MINIMAL + text)
    with pytest.raises(ConfigError, match=key):
        load_config(file)


def test_every_setting_says_what_it_is_and_what_it_may_be() -> None:
    tree = ast.parse(Path(config.__file__).read_text())
    said = set()
    for section in (one for one in tree.body if isinstance(one, ast.ClassDef)):
        for one, after in pairwise([*section.body, ast.Pass()]):
            if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                said.add((section.name, ast.unparse(one.target)))
    for section_type in (RunConfig, ValueStoreConfig, RolloutConfig, LearnerConfig, SandboxGatewayConfig):
        for name, field in section_type.model_fields.items():
            inherited = [one.__name__ for one in section_type.__mro__ if (one.__name__, name) in said]
            assert inherited, f"{section_type.__name__}.{name} is not documented"
            if field.annotation in (int, float, int | None, float | None):
                bounds = {type(bound).__name__ for bound in field.metadata}
                assert bounds & {"Ge", "Gt"}, f"{section_type.__name__}.{name} has no bound"


def test_tool_calls_go_to_the_sandbox_that_the_file_describes(file: Path) -> None:
    file.write_text(MINIMAL + "[sandbox_gateway]\nport = 9101\n")
    assert load_config(file).sandbox_url == "http://127.0.0.1:9101"
    file.write_text(MINIMAL + '[rollout]\nsandbox_url = "http://elsewhere:1"\n')
    assert load_config(file).sandbox_url == "http://elsewhere:1"


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
    loaded = load_config()
    assert loaded.run.total_steps == 7
    assert loaded.run.name == "r"
    assert "secret" not in repr(loaded)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SINGLESTREAM_LEARNRE__LR", "SINGLESTREAM_LEARNER__LR"),
        ("SINGLESTREAM_LEARNER_LR", "SINGLESTREAM_LEARNER__LR"),
        ("SINGLESTREAM_VALUE_STORE_READ_TOKEN", "SINGLESTREAM_VALUE_STORE__READ_TOKEN"),
        ("SINGLESTREAM_STORE__RHO_MIN", "SINGLESTREAM_VALUE_STORE__RHO_MIN"),
    ],
)
def test_a_variable_that_would_be_ignored_is_named(
    file: Path, name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "3")
    with pytest.raises(ConfigError, match=rf"environment: {name}: no such setting.*{meant}"):
        load_config(file)
    with pytest.raises(ConfigError, match=name):
        load_settings(None)


def test_no_variable_in_use_is_taken_for_a_misnamed_one() -> None:
    used: set[str] = set()
    places = ("benchmarks", "deploy", "docs", "examples", "scripts", "services", "singlestream")
    files = [path for place in places for path in (ROOT / place).rglob("*")]
    for path in [*files, ROOT / "docker-compose.yml", ROOT / ".env.example", ROOT / "Makefile"]:
        if path.is_file() and path.stat().st_size < 1 << 20 and path.suffix not in (".pyc", ".safetensors"):
            used |= set(re.findall(r"SINGLESTREAM_[A-Z0-9_]*[A-Z0-9]", path.read_text(errors="replace")))
    assert "SINGLESTREAM_RUN__REDIS_URL_FILE" in used
    assert list(misnamed_variables(used, "SINGLESTREAM_", Config)) == []


def test_no_file_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SINGLESTREAM_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="SINGLESTREAM_CONFIG"):
        load_config()
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.toml")
