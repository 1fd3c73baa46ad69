"""Bodies of the REST interface. Times are Unix seconds, rewards and values lie in [0, 1]."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.value_store.table import Split
from singlestream.contracts import Sampling

PROMPT_ID = r"^[0-9a-f]{16}$"
PromptId = Annotated[str, Field(pattern=PROMPT_ID, examples=["3f2a9c01d4e5b677"])]
"""16 hex digits: a hash of the source and the question."""

Text = Annotated[str, Field(min_length=1, max_length=1_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Reward = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class Body(BaseModel):
    """Base of requests: closed to unknown fields."""

    model_config = ConfigDict(extra="forbid")


class PromptIn(Body):
    """A prompt to insert, or to replace where source and question are known."""

    question: Text = Field(description="The task's text, without any chat template.", examples=["47*91=?"])
    answer: str = Field(description="Ground truth for the grader.", max_length=1_000_000, examples=["4277"])
    source: Name = Field(default="default", description="Data set it came from.", examples=["multiply"])
    environment: Name = Field(
        default="math_python", description="Environment that runs and grades it.", examples=["math_python"]
    )
    split: Split = Field(default="train", description="train: drawn for training; eval: drawn by jobs only.")
    prior_rewards: list[Reward] | None = Field(
        default=None,
        max_length=10_000,
        description="Offline rewards for the prior; used only while the prompt has no visits. None leaves the prior.",
    )


class ImportedPrompt(PromptIn):
    """A line or row of an import; other columns are passed over."""

    model_config = ConfigDict(extra="ignore")

    alpha: float | None = Field(default=None, gt=0, le=1e9, allow_inf_nan=False)
    beta: float | None = Field(default=None, gt=0, le=1e9, allow_inf_nan=False)


class Imported(BaseModel):
    """What an import did."""

    prompts: int = Field(description="Prompts inserted or updated.")
    priors: int = Field(description="Of these, prompts that came with a prior; those with visits kept their value.")
    unknown: int = Field(description="offline_values: texts of no known prompt.")


class Upserted(BaseModel):
    """Ids in the order of the request."""

    ids: list[PromptId]


class ValueOut(BaseModel):
    """A prompt's posterior."""

    prompt_id: PromptId
    alpha: float = Field(gt=0, description="Pseudo-count of success.")
    beta: float = Field(gt=0, description="Pseudo-count of failure.")
    v_hat: float = Field(gt=0, lt=1, description="Posterior mean α/(α+β): the baseline of the next lease.")
    n_eff: float = Field(gt=0, description="Observations that the posterior is worth now, faded by the policy's drift.")
    visits: int = Field(ge=0, description="Leases counted.")
    interval: tuple[float, float] = Field(description="95 % credible interval of the success rate.")
    version: int | None = Field(description="Policy version of the newest evidence; null without any.")
    updated_at_s: float = Field(description="Unix time of the last change.")
    in_flight: bool = Field(description="Whether a training lease of this prompt is outstanding.")
    source: str
    split: Split


class PromptOut(ValueOut):
    """A prompt and its posterior."""

    question: str
    answer: str
    environment: str


class PromptPage(BaseModel):
    """One page of a list."""

    prompts: list[PromptOut]
    cursor: str | None = Field(description="Pass it to get the next page; null on the last one.")


class HistoryEntry(BaseModel):
    """One update of a posterior."""

    lease_id: str
    outcome: Literal["trained", "stale"]
    version: int = Field(ge=0, description="Policy version of the trajectory's last generated segment.")
    reward: float
    rho: float = Field(gt=0, le=1, description="Share of old evidence that was kept.")
    v_hat_before: float
    v_hat_after: float
    n_eff: float = Field(description="After the update.")
    z: float = Field(description="Drift clock of that version.")
    v_hat_at_lease: float = Field(description="Baseline frozen at the lease.")
    at_s: float


class History(BaseModel):
    """Updates of one prompt, newest first; older ones than the bound are gone."""

    prompt_id: PromptId
    entries: list[HistoryEntry]


class ValuesQuery(Body):
    """Prompts to look up: by ids, or by exact texts of a source."""

    ids: list[PromptId] | None = Field(default=None, description="Ids to look up.")
    texts: list[str] | None = Field(default=None, description="Exact questions to look up.")
    source: str | None = Field(default=None, description="Source of the texts; null tries every known source.")


class Values(BaseModel):
    """Values in the order of the query; null where the prompt is not known."""

    values: list[ValueOut | None]


class TrainingIn(Body):
    """What training shall do."""

    state: Literal["running", "paused", "stopped"]


class Training(BaseModel):
    """What training does."""

    state: Literal["running", "paused", "stopping", "stopped", "finished"] = Field(
        description="stopping: the end marker is not in the stream yet; stopped: it is; finished: all steps trained."
    )
    waiting_for: str | None = Field(description="Why no training lease is issued now; null where they are issued.")
    trained: int
    total: int = Field(description="Trajectories that the run trains on: total_steps × train_batch_size.")
    outstanding: int
    headroom: int = Field(description="Training leases that admission allows now.")


class SamplingIn(Body):
    """How the engine samples."""

    temperature: float = Field(ge=0.0, le=100.0, allow_inf_nan=False, description="0 means greedy.")
    top_p: float = Field(gt=0.0, le=1.0)
    top_k: int = Field(ge=0, le=10_000_000, description="0 means no limit.")


class JobIn(Body):
    """Rewards to collect for prompts."""

    purpose: Literal["estimate", "evaluate"] = Field(
        description="estimate: rewards become the prompts' priors; evaluate: they are reported only."
    )
    split: Split | None = Field(default=None, description="Every prompt of that split; or give prompt_ids.")
    prompt_ids: list[PromptId] | None = Field(default=None, description="These prompts; or give split.")
    n: int = Field(default=1, ge=1, le=1024, description="Rewards a prompt.")
    limit: int | None = Field(default=None, ge=1, le=10**9, description="At most so many prompts of the split, by id.")
    sampling: SamplingIn | None = Field(
        default=None,
        description="null: estimate samples as training does; evaluate at temperature 0.6, top-p 0.95, top-k 20.",
    )


class JobOut(BaseModel):
    """A job and its totals."""

    job_id: str
    purpose: Literal["estimate", "evaluate"]
    state: Literal["running", "finished"]
    n: int
    prompts: int
    total: int = Field(description="prompts × n.")
    done: int = Field(description="Rewards collected.")
    failed: int = Field(description="Items without a reward after all their leases.")
    outstanding: int = Field(description="Items leased now.")
    reward_mean: float | None
    tool_calls_mean: float | None
    response_tokens_mean: float | None = Field(description="Tokens after the prompt, tools' output included.")
    versions: dict[str, int] = Field(description="Policy version → rewards that it gave.")
    sampling: Sampling
    created_at_s: float
    finished_at_s: float | None


class LedgerOut(BaseModel):
    """The leases of one purpose: leased = outstanding + trained + stale + failed + scored + cancelled."""

    leased: int
    outstanding: int
    trained: int
    stale: int
    failed: int
    scored: int
    cancelled: int
    adds_up: bool


class Ledger(BaseModel):
    """All leases, read from Redis at one moment."""

    train: LedgerOut
    estimate: LedgerOut
    evaluate: LedgerOut
    duplicates: int = Field(description="Closings that named no outstanding lease; they changed nothing.")
    epoch: str = Field(description="Middle part of the lease numbers given out now.")


class VersionOut(BaseModel):
    """A published policy version."""

    version: int
    lineage: int
    z: float
    drift: float
    published_at_s: float


class Policy(BaseModel):
    """Policy versions and the drift clock."""

    newest: VersionOut | None
    z_now: float
    versions: list[VersionOut] = Field(description="Oldest first, in the order of publication.")


class Preview(BaseModel):
    """What the sampler could draw next; nothing is leased."""

    prompts: list[ValueOut]


class ReplicaOut(BaseModel):
    """A rollout replica's last report."""

    name: str
    slots: int
    in_use: int
    version: int | None
    lineage: int | None
    at_s: float
    alive: bool


class ReliabilityBin(BaseModel):
    """Leases whose frozen v̂ lies in one tenth, and the rewards they got."""

    v_hat_low: float
    v_hat_high: float
    count: int
    v_hat_mean: float
    reward_mean: float


class Bin(BaseModel):
    """One bar of a histogram: low ≤ x < high."""

    low: float
    high: float
    count: int


class Stats(BaseModel):
    """The table at a glance."""

    prompts: int
    prompts_train: int
    visited: int
    visits: int
    v_hat_mean: float | None
    v_hat_histogram: list[Bin]
    n_eff_histogram: list[Bin]
    sampling_entropy_nats: float = Field(description="Of one draw among the prompts not in flight.")
    sampling_entropy_max_nats: float = Field(description="What a uniform draw would have.")
    brier: float | None = Field(description="Mean of (reward − v̂ at the lease)²; null before the first evidence.")
    reliability: list[ReliabilityBin]
    replicas: list[ReplicaOut]


class QueuesOut(BaseModel):
    """Lengths of the streams, about a second ago."""

    unread_leases: int
    held_leases: int
    trajectories: int
    posterior_updates: int
    results: int
    dead_letters: int
    read_at_s: float = Field(description="0: never.")


class LearnerOut(BaseModel):
    """The learner's last heartbeat."""

    step: int | None
    state: str | None
    waiting_for: str | None
    at_s: float | None
    alive: bool = Field(description="Whether it came within the last 30 s.")


class Snapshot(BaseModel):
    """The histogram of v̂ at one moment."""

    at_s: float
    counts: list[int] = Field(description="In 20 equal bins over [0, 1].")


class Overview(BaseModel):
    """The run at a glance, from the store's memory: it answers while Redis is away too."""

    run: str
    now_s: float
    store_waiting_for: str | None = Field(description="null while the store can write.")
    training: Training
    leases: dict[str, dict[str, int]] = Field(description="purpose → leased, outstanding and every outcome.")
    reward_mean: float | None = Field(description="Of the last 1,024 trajectories counted since the store's start.")
    staleness_mean: float | None = Field(description="Policy versions, of the same trajectories.")
    policy: VersionOut | None
    z_now: float
    queues: QueuesOut
    learner: LearnerOut | None = Field(description="null where it has never reported.")
    replicas: list[ReplicaOut]
    prompts: int
    visits: int
    v_hat_over_time: list[Snapshot] = Field(description="Oldest first, at most 61, the last one as it is now.")


class Problem(BaseModel):
    """An error as RFC 9457 describes it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Health(BaseModel):
    """Whether the process answers."""

    status: Literal["ok"] = "ok"
    epoch: str | None = None
