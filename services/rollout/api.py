"""The HTTP interface of a replica, the same with and without Ray."""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from services.rollout import completions
from services.rollout.episode import NothingSampled, PromptTooLong
from services.rollout.generation import EngineDead
from singlestream.contracts import Sampling
from singlestream.errors import ConfigError, SandboxError
from singlestream.streams import LOST

if TYPE_CHECKING:
    from services.rollout.replica import Replica


FAULTS: dict[type[Exception], int] = {PromptTooLong: 422, NothingSampled: 504, SandboxError: 502, EngineDead: 503}
"""How an episode can fail that is not the fault of its environment or grader → HTTP status."""


class EpisodeRequest(BaseModel):
    """One episode to run, outside of training."""

    model_config = ConfigDict(extra="forbid")

    question: str = Field(min_length=1, max_length=200_000)
    """The task's text."""
    answer: str = Field(default="", max_length=20_000)
    """Ground truth for the grader."""
    source: str = Field(default="default", max_length=200)
    """Data set that the task is from, for graders that ask."""
    environment: str = Field(default="math_python", max_length=200)
    """Environment, optionally with a grader: ``math_python/package.module:function``."""
    temperature: float = Field(default=1.0, ge=0.0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    """0 means no limit."""


class ScaleRequest(BaseModel):
    """How many replicas the run may have from now on."""

    model_config = ConfigDict(extra="forbid")

    replicas: int = Field(le=1024)
    """Most replicas, at least 1; fewer run where the nodes have no room for more."""

    @field_validator("replicas")
    @classmethod
    def _leaves_one(cls, replicas: int) -> int:
        if replicas < 1:
            raise ValueError("at least 1: without a replica nobody answers this interface; POST /v1/control pauses all")
        return replicas


class ControlRequest(BaseModel):
    """What every replica shall do."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["pause", "resume", "refresh"]
    """``pause``: take no more leases, what runs goes on; it holds until ``resume``, for later replicas too.

    ``refresh``: load the newest policy version from its file again, even if it is the one that is held.
    """


@contextmanager
def _redis_needed() -> Iterator[None]:
    """503 where Redis is away or refuses."""
    try:
        yield
    except LOST as error:
        raise HTTPException(503, f"Redis is away, nothing may have changed: {error}") from error


def create_app(replica_of: Callable[[], Replica]) -> FastAPI:
    """The application.

    Args:
        replica_of: gives the replica of this process; asked at every request.
    """
    app = FastAPI(title="Singlestream rollout", version="1")

    @app.get("/health")
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """503 if the engine is dead or hung."""
        try:
            await replica_of().check_health()
        except EngineDead as error:
            raise HTTPException(503, str(error)) from error
        return {"status": "ok", "replica": replica_of().name}

    @app.get("/readyz")
    async def readyz() -> dict[str, Any]:
        """503 and what is waited for, until the engine runs and has loaded a published policy."""
        replica = replica_of()
        if replica.waiting_for is not None:
            raise HTTPException(503, replica.waiting_for)
        return {"status": "ready", "run": replica.config.run.name, "replica": replica.name, **replica.worker.report()}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics of this replica."""
        return Response(generate_latest(replica_of().metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(_guarded(replica_of))
    return app


def _guarded(replica_of: Callable[[], Replica]) -> APIRouter:
    """What needs the token where there is one."""

    async def authorize(request: Request) -> None:
        token = replica_of().config.rollout.token
        told = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and not secrets.compare_digest(told.encode(), token.get_secret_value().encode()):
            raise HTTPException(401, "Authorization: Bearer <rollout.token> is needed")

    guarded = APIRouter(dependencies=[Depends(authorize)])

    @guarded.put("/v1/scale")
    async def scale(request: ScaleRequest) -> dict[str, Any]:
        """Set how many replicas the run may have; new ones take a minute, surplus ones hand their episodes over."""
        with _redis_needed():
            await replica_of().set_cap(request.replicas)
        return {"replicas": request.replicas}

    @guarded.post("/v1/control")
    async def control(request: ControlRequest) -> dict[str, Any]:
        """Tell every replica; one that starts later finds a pause in Redis. Returns what those that run now say."""
        with _redis_needed():
            return {"replicas": await replica_of().control_run(request.action)}

    @guarded.post("/v1/episodes")
    async def episodes(request: EpisodeRequest) -> dict[str, Any]:
        """Run one episode and return its whole trace; 422 has the traceback where environment or grader raise."""
        sampling = Sampling(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k)
        replica = replica_of()
        try:
            replica.environment(request.environment)
        except (KeyError, ConfigError) as error:
            raise HTTPException(422, f"environment {request.environment!r}: {error}") from error
        except Exception as error:  # a user's module that does not import
            raise HTTPException(422, traceback.format_exc()) from error
        try:
            return await replica.run_episode(
                request.question, request.answer, request.source, request.environment, sampling
            )
        except tuple(FAULTS) as error:
            status = next(status for kind, status in FAULTS.items() if isinstance(error, kind))
            raise HTTPException(status, str(error)) from error
        except Exception as error:  # the environment and the grader are the user's code, which is tried out here
            raise HTTPException(422, traceback.format_exc()) from error

    guarded.include_router(completions.router(replica_of))
    return guarded
