"""Replies of the value store's REST interface: what the service sends is what its clients read.

Times are Unix seconds, rewards and values lie in [0, 1].
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from singlestream.contracts import Sampling

PROMPT_ID = r"^[0-9a-f]{16}$"
PromptId = Annotated[str, Field(pattern=PROMPT_ID, examples=["fd050b7395755f9d"])]
"""16 hex digits: a hash of the source and the question."""
Interval = Annotated[
    tuple[float, float],
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}),
]
"""(low, high); a list in the document, as generators of clients know it."""
Split = Literal["train", "eval"]
TrainingState = Literal["running", "paused", "stopping", "stopped", "finished"]


class Reply(BaseModel):
    """Base of replies: immutable; fields of a newer store are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Value(Reply):
    """A prompt's posterior."""

    prompt_id: PromptId
    alpha: float = Field(gt=0, description="Pseudo-count of success.")
    beta: float = Field(gt=0, description="Pseudo-count of failure.")
    v_hat: float = Field(gt=0, lt=1, description="Posterior mean α/(α+β): the baseline of the next lease.")
    weight: float = Field(
        gt=0,
        description="What the draw goes by, of a training prompt not in flight; thompson: that of the posterior mean.",
    )
    n_eff: float = Field(gt=0, description="Observations that the posterior is worth now, faded by the policy's drift.")
    visits: int = Field(ge=0, description="Leases counted.")
    interval: Interval = Field(description="95 % credible interval of the success rate.")
    version: int | None = Field(description="Policy version of the newest evidence; null without any.")
    updated_at_s: float = Field(description="Unix time of the last change.")
    in_flight: bool = Field(description="Whether a training lease of this prompt is outstanding.")
    source: str
    split: Split


class PromptValue(Value):
    """A prompt and its posterior."""

    question: str
    answer: str
    environment: str


class Page(Reply):
    """One page of a list."""

    prompts: list[PromptValue]
    cursor: str | None = Field(description="Pass it to get the next page; null on the last one.")


class Ids(Reply):
    """Ids in the order of the request."""

    ids: list[PromptId]


class HistoryEntry(Reply):
    """One update of a posterior."""

    lease_id: str
    outcome: Literal["trained", "stale"]
    version: int = Field(ge=0, description="Policy version of the trajectory's last generated segment.")
    reward: float
    rho: float = Field(gt=0, le=1, description="Share of old evidence that was kept.")
    v_hat_before: float
    v_hat_after: float
    n_eff: float = Field(description="After the update.")
    interval: Interval = Field(description="95 % credible interval of the success rate after the update.")
    z: float = Field(description="Drift clock of that version.")
    v_hat_at_lease: float = Field(description="Baseline frozen at the lease.")
    at_s: float


class History(Reply):
    """Updates of one prompt, newest first; older ones than the bound are gone."""

    prompt_id: PromptId
    entries: list[HistoryEntry]


class TrajectorySegment(Reply):
    """A run of tokens with one origin."""

    kind: Literal["prompt", "generated", "observation"] = Field(description="observation: a tool's output.")
    version: int | None = Field(description="generated: the policy version that sampled it.")
    tokens: int
    text: str | None = Field(description="null where the model's tokenizer is not beside the value store.")


class TrajectoryToolCall(Reply):
    """One execution of one code block."""

    turn: int
    status: str
    wall_s: float


class ShownTrajectory(Reply):
    """A graded episode."""

    lease_id: str
    reward: float
    v_hat: float = Field(description="Baseline frozen at the lease.")
    version: int = Field(description="Policy version of its last generated segment.")
    end_reason: str
    turns: int
    attempts: int = Field(description="Replicas that started this lease.")
    finished_at_s: float
    tool_calls: list[TrajectoryToolCall]
    segments: list[TrajectorySegment]


class Trajectories(Reply):
    """The prompt's last trajectories that the store still holds, newest first."""

    prompt_id: PromptId
    trajectories: list[ShownTrajectory]


class Values(Reply):
    """Values in the order of the query; null where the prompt is not known."""

    values: list[Value | None]


class Training(Reply):
    """What training does."""

    state: TrainingState = Field(
        description="stopping: the end marker is not in the stream yet; stopped: it is; finished: all steps trained."
    )
    waiting_for: str | None = Field(
        description="Why no training lease is issued now, or what an early stop waits for; null where leases are "
        "issued, and once training has ended."
    )
    trained: int
    total: int = Field(description="Trajectories that the run trains on: total_steps × train_batch_size.")
    outstanding: int
    headroom: int = Field(description="Training leases that admission allows now.")


class Job(Reply):
    """A job and its totals."""

    job_id: str
    purpose: Literal["estimate", "evaluate"]
    state: Literal["running", "finished", "failed"]
    error: str | None = Field(description="failed: why it ended before all of its items did.")
    waiting_for: str | None = Field(description="Why nothing is leased for it now; null where something may be.")
    pinned: bool
    version: int | None = Field(description="Policy version of a pinned job, once a replica holds it.")
    lineage: int | None
    n: int
    prompts: int
    total: int = Field(description="prompts × n.")
    done: int = Field(description="Rewards collected.")
    failed: int = Field(description="Items without a reward after all their leases.")
    outstanding: int = Field(description="Items leased now.")
    reward_mean: float | None
    tool_calls_mean: float | None
    response_tokens_mean: float | None = Field(description="Tokens after the prompt, tools' output included.")
    versions: dict[int, int] = Field(description="Policy version → rewards that it gave.")
    sampling: Sampling
    created_at_s: float
    finished_at_s: float | None


class Jobs(Reply):
    """One page of the list of jobs."""

    jobs: list[Job]
    cursor: str | None = Field(description="Pass it to get the next page; null on the last one.")


class PurposeLedger(Reply):
    """The leases of one purpose: leased = outstanding + trained + stale + failed + scored + cancelled."""

    leased: int
    outstanding: int
    trained: int
    stale: int
    failed: int
    scored: int
    cancelled: int
    adds_up: bool


class Ledger(Reply):
    """All leases, read from Redis at one moment."""

    train: PurposeLedger
    estimate: PurposeLedger
    evaluate: PurposeLedger
    duplicates: int = Field(description="Closings that named no outstanding lease; they changed nothing.")
    epoch: str = Field(description="Middle part of the lease numbers given out now.")


class Version(Reply):
    """A published policy version."""

    version: int
    lineage: int
    z: float
    drift: float
    published_at_s: float


class Policy(Reply):
    """Policy versions and the drift clock."""

    newest: Version | None
    z_now: float
    versions: list[Version] = Field(description="Oldest first, in the order of publication.")


class Preview(Reply):
    """What the sampler could draw next; nothing is leased."""

    prompts: list[Value]


class Replica(Reply):
    """A rollout replica's last report."""

    name: str
    slots: int
    in_use: int
    version: int | None
    lineage: int | None
    at_s: float
    alive: bool


class ReliabilityBin(Reply):
    """Leases whose frozen v̂ lies in one tenth, and the rewards they got."""

    v_hat_low: float
    v_hat_high: float
    count: int
    v_hat_mean: float
    reward_mean: float


class Bin(Reply):
    """One bar of a histogram: low ≤ x < high."""

    low: float
    high: float
    count: int


class Stats(Reply):
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
    replicas: list[Replica]
