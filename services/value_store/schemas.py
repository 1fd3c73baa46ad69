"""Bodies that the REST interface takes, and the replies that its own page and probes alone read.

The other replies stand in `singlestream.clients.value_store_replies`. Times are Unix seconds, rewards and values lie in
[0, 1].
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from singlestream.clients.value_store_replies import PromptId, Replica, Split, Training, Version

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


class ValuesQuery(Body):
    """Prompts to look up: by ids, or by exact texts of a source."""

    ids: list[PromptId] | None = Field(default=None, description="Ids to look up.")
    texts: list[Annotated[str, Field(max_length=1_000_000)]] | None = Field(
        default=None, description="Exact questions to look up."
    )
    source: Name | None = Field(default=None, description="Source of the texts; null tries every known source.")


class TrainingIn(Body):
    """What training shall do."""

    state: Literal["running", "paused", "stopped"]


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
    pinned: bool = Field(
        default=False,
        description="evaluate only: one policy version samples everything; its replicas take neither weights nor "
        "training leases meanwhile. False: the results name the versions met.",
    )
    resume: bool = Field(
        default=False,
        description="Answer with the newest job that asks for the same and has not failed, where there is one (200); "
        "of evaluations only one under way.",
    )


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
    policy: Version | None
    z_now: float
    queues: QueuesOut
    learner: LearnerOut | None = Field(description="null where it has never reported.")
    replicas: list[Replica]
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
    run: str | None = Field(default=None, description="Name of the run that is served; null from /healthz.")
