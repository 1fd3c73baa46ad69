"""One TOML file per run. A fact that several services share stands once, in ``[run]``.

Environment variables override: ``SINGLESTREAM_<SECTION>__<KEY>``, for example ``SINGLESTREAM_RUN__REDIS_URL``; a
misspelt one is refused. The file is named by ``--config`` or by ``SINGLESTREAM_CONFIG``. Paths in it are relative to
the working directory.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from singlestream.errors import ConfigError
from singlestream.validation import misnamed_variables, problems

LOOPBACK = ("127.0.0.1", "::1", "localhost")

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of the sections: immutable, closed to unknown keys, with no NaN or infinity in its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunConfig(Section):
    """What all services must agree on."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    """Name of the run: prefix of its Redis keys and of its folders."""
    model: Path
    """Folder of a Hugging Face causal language model and its tokenizer: the policy at version 0."""
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", pattern=r"^(rediss?|unix)://")
    """``redis://``, ``rediss://`` or ``unix://``; ``singlestream up`` replaces it by the private server it starts."""
    total_steps: int = Field(gt=0)
    """Train batches of the whole run; each makes one policy version."""
    train_batch_size: int = Field(default=256, gt=0)
    """Trajectories of one step (docs/design.md's default)."""
    max_staleness: int = Field(default=4, ge=0)
    """Policy versions that generation may run ahead (I4); 0 is synchronous training."""
    hard_staleness: int | None = Field(default=None, ge=0)
    """Older segments are masked (I11); None means 2 × max_staleness."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Sampling temperature of training; the learner scores with the same."""
    engine_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the published weights and of the engines' compute."""
    seed: int = Field(default=0, ge=0)
    """Seed of the run; each replica and each store derives its own."""
    runs_dir: Path = Path("runs")
    """Checkpoints, logs and reports go to ``runs_dir/name``."""
    weights_dir: Path = Path("/dev/shm")  # noqa: S108  a memory volume on purpose
    """Shared memory volume through which weights travel; a folder per run is made in it."""
    weights_token: SecretStr | None = None
    """Bearer token for weights over HTTP, learner's and replicas'; None: none is asked for, on loopback only."""

    @property
    def dir(self) -> Path:
        """Folder of this run."""
        return self.runs_dir / self.name

    @property
    def weights_path(self) -> Path:
        """Folder of this run's weight files."""
        return self.weights_dir / f"singlestream-{self.name}"

    @property
    def staleness_bound(self) -> int:
        """Policy versions after which a segment is masked (I11)."""
        return 2 * self.max_staleness if self.hard_staleness is None else self.hard_staleness


class Listening(Section):
    """A service that listens for HTTP."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback needs a key where the service has one."""
    port: int = Field(ge=1, le=65535)
    """TCP port, one for each service of a machine."""

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{self.host}:{self.port}"


class ValueStoreConfig(Listening):
    """The value store."""

    port: int = Field(default=8100, ge=1, le=65535)
    read_token: SecretStr | None = None
    """Bearer token that may read; None: no token is asked for, on loopback only."""
    write_token: SecretStr | None = None
    """Bearer token that may read and write; None: no token is asked for, on loopback only."""
    retention: Literal["constant", "kl", "event", "drift"] = "drift"
    """How fast old evidence fades (docs/design.md, the value store)."""
    rho_constant: float = Field(default=0.92, gt=0.0, lt=1.0)
    """ρ of ``constant``: the geometric middle of the band below."""
    rho_min: float = Field(default=0.875, gt=0.0, lt=1.0)
    """Floor of ρ: a window of 8 observations (docs/spo.md)."""
    rho_max: float = Field(default=0.96, gt=0.0, lt=1.0)
    """Ceiling of ρ: a window of 25 observations (docs/spo.md)."""
    rho_event: float = Field(default=0.875, gt=0.0, lt=1.0)
    """ρ of one policy version in ``event`` (SPO++; docs/spo.md)."""
    shrinkage: float = Field(default=0.0, ge=0.0)
    """κ: a lease's v̂ is drawn towards the last batch's mean reward as by so many observations (docs/design.md)."""
    training: Literal["paused", "running"] = "paused"
    """What training does in a run that has no state yet: wait for priors and prompts, or lease at once."""
    sampling: Literal["uncertainty", "uniform", "thompson"] = "uncertainty"
    """How prompts are drawn."""
    epsilon: float = Field(default=0.05, gt=0.0)
    """Exploration: added to every weight √(v̂(1−v̂)) (docs/spo.md)."""
    group_size: int = Field(default=1, ge=1)
    """Training leases of one prompt issued at once: 1 is SPO, more is for ``learner.advantage = "grpo"``."""
    gamma: float = Field(default=0.0, ge=0.0, le=1.0)
    """The weight is divided by n_eff^γ (ICLR version of SPO); 0 switches that off."""
    history_entries: int = Field(default=256, gt=0)
    """Updates kept per prompt for its story."""
    finished_jobs_kept: int = Field(default=100, ge=1)
    """Finished jobs kept with their results; older ones are dropped as new ones are made."""
    dead_letters_kept: int = Field(default=10_000, ge=1)
    """Messages that could not be used, kept to look at; older ones are dropped and counted."""
    redis_memory_share: float = Field(default=0.6, gt=0.0, lt=1.0)
    """Leasing stops above this share of Redis' maxmemory; the server of ``singlestream up`` has none."""
    redis_deadline_s: float = Field(default=600.0, gt=0.0)
    """So long the store waits for a Redis that is away before it exits with the cause."""
    max_prompts_per_request: int = Field(default=10_000, ge=1)
    """Prompts in one upsert, ids or texts in one look-up; more get 422."""
    max_request_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Larger request bodies get 413; imports are streamed and have a bound of their own."""
    max_import_bytes: int = Field(default=16 * 1024**3, ge=1024)
    """Larger imports get 413: a million prompts of 16 KiB."""
    max_page: int = Field(default=1000, ge=1)
    """Prompts on one page of a list."""
    max_requests_per_s: float = Field(default=2000.0, gt=0.0)
    """Requests a second, averaged, of one client address; beyond it 429 with Retry-After."""

    @model_validator(mode="after")
    def _band(self) -> ValueStoreConfig:
        if self.rho_min > self.rho_max:
            raise ValueError("rho_min must not exceed rho_max")
        return self


class RolloutConfig(Listening):
    """The rollout service."""

    port: int = Field(default=8102, ge=1, le=65535)
    token: SecretStr | None = None
    """Bearer token of the ``/v1`` endpoints; None: no token is asked for, on loopback only."""
    replicas: int = Field(default=1, ge=1)
    """Engine replicas at the start; ``singlestream scale`` changes their number."""
    max_replicas: int = Field(default=8, ge=1)
    """Most engine replicas on this machine where the service brings its own Ray and there is no GPU."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one engine."""
    slots: int = Field(default=64, ge=1)
    """Episodes that one replica runs at a time; at most the engine's sequences."""
    max_model_tokens: int = Field(default=4096, ge=16)
    """Context of the engine, prompt and response together."""
    max_response_tokens: int = Field(default=2048, ge=1)
    """Tokens after the prompt, observations included."""
    max_turns: int = Field(default=8, ge=1)
    """Model turns of an episode (docs/spo.md)."""
    max_tool_calls: int = Field(default=16, ge=0)
    """Code blocks run in one episode."""
    max_observation_chars: int = Field(default=2000, ge=1)
    """Longer tool output is truncated."""
    truncate: Literal["left", "right", "middle"] = "middle"
    """Which part of too long tool output is dropped."""
    episode_deadline_s: float = Field(default=600.0, gt=0.0)
    """Wall time of an episode; then it is graded as it stands (``deadline``)."""
    lease_timeout_s: float = Field(default=60.0, gt=0.0)
    """A lease whose holder sent no heartbeat for so long is claimed by another; heartbeats go at a quarter of it."""
    max_attempts: int = Field(default=3, ge=1)
    """Replicas that may start a lease before it fails."""
    evaluation_share: float = Field(default=0.5, gt=0.0, le=1.0)
    """While training runs, most of all slots that evaluation may hold at a time; training keeps the rest.
    A pinned evaluation takes whole replicas: this share of them, rounded down, but one at least, so that training
    stands still for it only where there is but one.
    """
    clear_cache: bool = False
    """Whether a weight update recomputes running requests' KV under the new weights."""
    sandbox_url: str | None = None
    """Sandbox gateway for tool calls; None: the one of ``[sandbox_gateway]``, on this machine."""
    tool_timeout_s: float = Field(default=10.0, gt=0.0, le=60.0)
    """Wall time of one code block."""
    kv_cache_gib: float = Field(default=1.0, gt=0.0)
    """KV cache of an engine on CPU."""
    gpu_memory_share: float = Field(default=0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory for the engine."""
    cpu_threads: int | None = Field(default=None, ge=1)
    """OpenMP threads of one engine on CPU; None: vLLM binds to cores for one replica, one thread each for several."""
    engine_start_timeout_s: float = Field(default=900.0, gt=0.0)
    """Loading the model and starting the engine may take so long."""
    engine_timeout_s: float = Field(default=120.0, gt=0.0)
    """An engine that answers no control message for so long is hung, and its replica is replaced."""
    weights_timeout_s: float = Field(default=600.0, gt=0.0)
    """A lease waits so long for the policy version it asks for; then it goes back."""
    stop_timeout_s: float = Field(default=20.0, gt=0.0)
    """A stopping replica has so long to hand its episodes over."""
    ray_address: str | None = None
    """Ray cluster to join; None starts a private one on this machine."""


class LearnerConfig(Section):
    """The learner."""

    metrics_host: str = "127.0.0.1"
    """Address of rank 0's metrics, which tell no prompt and take no command."""
    metrics_port: int = Field(default=8103, ge=1, le=65535)
    """Port of rank 0's Prometheus metrics, and of its weights where they are served."""
    weights_url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+$")
    """Where replicas on other machines reach ``metrics_port``, for example ``http://10.0.0.5:8103``.
    The policy versions carry it, and deltas are written. None: weights travel through ``run.weights_dir`` alone.
    """
    ranks: int = Field(default=1, ge=1)
    """Processes on this machine; one a GPU, or gloo ranks on CPU."""
    lr: float = Field(default=1e-6, gt=0.0)
    """Learning rate (docs/spo.md)."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """AdamW's (docs/spo.md)."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's, each in [0, 1)."""
    grad_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are clipped to this norm (docs/spo.md)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from lr/warmup_steps."""
    advantage: Literal["spo", "grpo"] = "spo"
    """``spo``: r − v̂, standardised over the batch; ``grpo``: r less its group's mean (``value_store.group_size``)."""
    normaliser: Literal["token", "trajectory"] = "token"
    """Over what ``spo``'s advantages are standardised (docs/design.md, the learner)."""
    group_std: bool = True
    """Whether ``grpo`` divides by its group's standard deviation."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer updates of one batch, each on its own share of it; above 1 p is recomputed at the batch's start."""
    old: Literal["sg", "behaviour"] = "sg"
    """Old policy of the ratio: the learner's own at the start of the batch, or the engine's."""
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """r is clipped below at 1 − clip_low."""
    clip_high: float = Field(default=0.28, gt=0.0)
    """r is clipped above at 1 + clip_high."""
    dual_clip: float = Field(default=10.0, gt=1.0)
    """For A < 0 the objective is at least dual_clip·A (docs/spo.md, R)."""
    truncation: float | None = Field(default=2.0, gt=0.0)
    """Cap of the importance weight e^(p−b); None (0 in a file) switches truncation and masking off."""
    ratio_mask: float = Field(default=8.0, gt=1.0)
    """Tokens with e^(p−b) outside [1/ratio_mask, ratio_mask] weigh nothing."""
    micro_batch_tokens: int = Field(default=16_384, ge=16)
    """Tokens of one packed micro-batch on one rank; a longer trajectory gets one of its own."""
    attention: Literal["packed", "padded"] = "packed"
    """``packed``: one row, no padding; ``padded``: rows of similar length, for models with windows, recurrent or
    convolutional layers, which are refused otherwise (docs/learner.md, the model)."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the forward and backward pass; masters and reductions are fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora_rank: int = Field(default=0, ge=0)
    """Train adapters of this rank on ``lora_targets`` instead of the whole model (needs peft); 0: the whole model."""
    lora_alpha: float = Field(default=32.0, gt=0.0)
    """The adapters count lora_alpha/lora_rank times."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Last part of the names of the linear layers that get an adapter."""
    peak_tflops: float = Field(default=0.0, ge=0.0)
    """Dense bf16 peak of one rank's device in TFLOP/s (H100 SXM: 989), for the MFU; 0: no MFU is told."""
    wandb_project: str = ""
    """Weights & Biases project that gets every step's record (needs wandb); empty: none."""
    logprob_chunk_tokens: int = Field(default=1024, ge=1)
    """Tokens whose logits are in memory at a time."""
    d_half: float = Field(default=0.06, gt=0.0)
    """Mean |Δ log p| that halves old evidence (docs/spo.md, R)."""
    probe_tokens: int = Field(default=32_768, ge=1)
    """Action tokens of the next batch that the drift clock probes (docs/design.md)."""
    anchor_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of the prompts whose previous response is kept to measure exact drift; ``kl`` retention keeps all."""
    anchor_bytes: int = Field(default=1024**3, ge=0)
    """Redis memory for kept responses, compressed; beyond it the oldest go."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept; entries of the stream are kept from the oldest of them on."""
    archive_every: int = Field(default=0, ge=0)
    """A checkpoint whose step is a multiple of this is kept for good, to be exported; 0 keeps none."""
    wait_warn_s: float = Field(default=60.0, gt=0.0)
    """After so long without any arrival the log says what is waited for, and again at every further multiple."""
    wait_timeout_s: float = Field(default=3600.0, gt=0.0)
    """After so long without any trajectory the learner exits with the cause; not while training is paused."""
    redis_deadline_s: float = Field(default=300.0, gt=0.0)
    """Redis may be away for so long before the learner exits with the cause."""
    deterministic: bool = False
    """Bitwise repeatable steps on CPU: deterministic kernels, one thread."""

    @field_validator("truncation", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return None if value in (0, "0") else value  # TOML has no null

    @model_validator(mode="after")
    def _one_mechanism(self) -> LearnerConfig:
        if self.old == "behaviour" and self.truncation is not None:
            raise ValueError(
                'old = "behaviour" and truncation act on one ratio: set one of them (docs/design.md, loss)'
            )
        return self


class SandboxGatewayConfig(Listening):
    """The sandbox gateway (docs/sandbox.md has the measurements behind the defaults)."""

    port: int = Field(default=8101, ge=1, le=65535)
    slots: int | None = Field(default=None, ge=1)
    """Runs at a time; None means 2 × cores."""
    queue_per_slot: int = Field(default=32, ge=1)
    """Requests that may wait, for each slot; beyond that 429."""
    queue_timeout_s: float = Field(default=30.0, gt=0.0)
    """A request that waited so long gets 504."""
    memory_mb: int = Field(default=1024, ge=64, le=4096)
    """Address space of one run where the request names none, in MiB."""
    max_timeout_s: float = Field(default=60.0, gt=0.0)
    """Largest wall time a request may ask for."""
    preload: tuple[str, ...] = ("numpy", "scipy", "sympy", "mpmath", "networkx", "pandas")
    """Modules imported before the first run; all must be installed. Others that are installed work too, slower."""
    python: Path | None = None
    """Interpreter whose libraries the runs see; None means the gateway's own."""
    recycle_runs: int = Field(default=20_000, ge=1)
    """Runs after which a fresh zygote replaces one, in the background: forks of one share their memory layout."""
    recycle_s: float = Field(default=3600.0, gt=0.0)
    """Age in seconds after which a zygote is replaced, for the same reason."""


class Config(BaseSettings):
    """One run's settings, from its TOML file and the environment."""

    model_config = SettingsConfigDict(
        env_prefix="SINGLESTREAM_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    run: RunConfig
    value_store: ValueStoreConfig = ValueStoreConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    sandbox_gateway: SandboxGatewayConfig = SandboxGatewayConfig()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment goes before the file (which arrives as the constructor's arguments)."""
        return env_settings, init_settings

    @property
    def sandbox_url(self) -> str:
        """Where tool calls go."""
        return self.rollout.sandbox_url or self.sandbox_gateway.url

    @property
    def anchor_share(self) -> float:
        """Share of the prompts whose previous response is kept, in [0, 1]."""
        return 1.0 if self.value_store.retention == "kl" else self.learner.anchor_share

    @model_validator(mode="after")
    def _groups(self) -> Config:
        size, batch = self.value_store.group_size, self.run.train_batch_size
        if (self.learner.advantage == "grpo") != (size > 1):
            raise ValueError(
                f'learner.advantage = "grpo" needs value_store.group_size above 1, and "spo" needs 1; it is {size}'
            )
        if batch % size:
            raise ValueError(f"run.train_batch_size {batch} is no multiple of value_store.group_size {size}")
        return self

    @model_validator(mode="after")
    def _limits(self) -> Config:
        if self.rollout.max_response_tokens >= self.rollout.max_model_tokens:
            raise ValueError(
                "rollout.max_response_tokens must be below rollout.max_model_tokens: the prompt needs room"
            )
        if self.rollout.tool_timeout_s > self.sandbox_gateway.max_timeout_s:
            raise ValueError(
                "rollout.tool_timeout_s is above sandbox_gateway.max_timeout_s: every call would be refused"
            )
        return self


def check_environment() -> None:
    """Raise `ConfigError` if a variable is meant as a setting and is none: nothing else would ever tell."""
    if misnamed := list(misnamed_variables(os.environ, "SINGLESTREAM_", Config)):
        raise ConfigError(f"environment: {'; '.join(misnamed)}")


def load_config(path: Path | str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """Read and check a run's settings.

    Args:
        path: TOML file; None takes the one that ``SINGLESTREAM_CONFIG`` names.
        overrides: ``{section: {key: value}}`` that win over the file but not over the environment.

    Raises:
        ConfigError: no file, no TOML, or a setting that is unknown or out of range. Names the file and the keys, or the
            variables of the environment.
    """
    check_environment()
    path = path or os.environ.get("SINGLESTREAM_CONFIG")
    if not path:
        raise ConfigError("no configuration: pass --config FILE or set SINGLESTREAM_CONFIG")
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for section, settings in (overrides or {}).items():
        values[section] = {**values.get(section, {}), **settings}
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems(error, Config)}") from error
