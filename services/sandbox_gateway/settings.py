"""The gateway's settings.

They come from a run's TOML file, or, as the gateway is stateless and needs no run, from the environment alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from singlestream.config import SandboxGatewayConfig, check_environment, load_config
from singlestream.errors import ConfigError


class _Standalone(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="SINGLESTREAM_",
        env_nested_delimiter="__",
        frozen=True,
        extra="ignore",
        nested_model_default_partial_update=True,
    )

    sandbox_gateway: SandboxGatewayConfig = SandboxGatewayConfig()


def config_file(argument: str | None) -> Path | None:
    """The configuration file: the argument, else what ``SINGLESTREAM_CONFIG`` names, else None."""
    name = argument or os.environ.get("SINGLESTREAM_CONFIG")
    return Path(name).absolute() if name else None


def load_settings(path: Path | None) -> SandboxGatewayConfig:
    """Read the gateway's settings.

    Raises:
        ConfigError: a setting is wrong; names it.
    """
    if path is not None:
        return load_config(path).sandbox_gateway
    check_environment()
    try:
        return _Standalone().sandbox_gateway
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"environment: {problems}") from error
