"""One replica put together: engine, weights, worker, environments, and what its HTTP interface tells."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import httpx

from services.rollout.engine import VllmEngine
from services.rollout.environments import Environment, make_environment
from services.rollout.episode import Episode, Finished
from services.rollout.generation import EngineDead
from services.rollout.lease_run import LeaseRunner, reward_of
from services.rollout.manifest import model_tensors
from services.rollout.metrics import Metrics
from services.rollout.process_env import node_name
from services.rollout.tools import SandboxTools
from services.rollout.weight_fetch import WeightFetcher
from services.rollout.weights import WeightKeeper
from services.rollout.worker import RolloutWorker
from singlestream.clients.sandbox import SandboxClient
from singlestream.config import Config
from singlestream.contracts import Lease, Sampling
from singlestream.streams import Keys, LeaseConsumer, connect, wait_for_redis

log = logging.getLogger(__name__)

REDIS_START_S = 120.0
Control = Literal["pause", "resume", "refresh"]


def replica_name() -> str:
    """A name that no other replica has had or will have."""
    return f"{node_name()}-{os.getpid()}-{secrets.token_hex(4)}"


_current: Replica | None = None


def current() -> Replica:
    """The replica of this process. Raises RuntimeError where there is none."""
    if _current is None:
        raise RuntimeError("this process runs no replica")
    return _current


def make_current(replica: Replica) -> None:
    """Name the replica of this process, for what only knows the process: Serve's HTTP interface."""
    global _current
    _current = replica


class Replica:
    """Everything one replica holds.

    Args:
        config: the run's settings.

    Raises:
        ConfigError: the model's folder holds no model.
    """

    def __init__(self, config: Config) -> None:
        from transformers import AutoTokenizer

        self.config, self.name = config, replica_name()
        self.metrics = Metrics()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(config.run.model)
        self.redis = connect(config.run.redis_url)
        self.sandbox = SandboxClient(config.sandbox_url)
        self._probe = httpx.AsyncClient(base_url=config.sandbox_url, timeout=5.0)
        self.engine = VllmEngine(config, self.name, self.tokenizer, self.metrics)
        self._environments: dict[str, Environment] = {}
        keys = Keys(config.run.name)
        self.weights = WeightKeeper(
            self.redis,
            keys,
            self.engine,
            model_tensors(config.run.model),
            config.rollout,
            self.metrics,
            WeightFetcher(config.run, self.metrics, config.rollout.weights_timeout_s),
        )
        runner = LeaseRunner(
            LeaseConsumer(self.redis, keys, self.name),
            self.engine,
            self.weights,
            self.environment,
            self.tools,
            self.tools_healthy,
            config.rollout,
            self.metrics,
        )
        self.worker = RolloutWorker(runner, node_name())
        self._work: asyncio.Task[None] | None = None
        self._started = False
        self.broadcast: Callable[[Control], Awaitable[list[dict[str, Any]]]] = self._control_alone
        """`control` of every replica that this one can reach: of itself, or of all under Serve."""

    async def _control_alone(self, action: Control) -> list[dict[str, Any]]:
        return [await self.control(action)]

    def environment(self, name: str) -> Environment:
        """Environment by name, made once. Raises KeyError or `ConfigError` for one that is not known."""
        if name not in self._environments:
            self._environments[name] = make_environment(name, self.tokenizer)
        return self._environments[name]

    def tools(self) -> SandboxTools:
        """A fresh tool runner."""
        return SandboxTools(self.sandbox, self.config.rollout, self.metrics)

    async def tools_healthy(self) -> bool:
        """Whether the sandbox gateway takes requests: one whose jails are all down lives, and runs nothing."""
        try:
            reply = await self._probe.get("/readyz")
        except httpx.HTTPError:
            return False
        return reply.status_code == 200

    async def start(self) -> None:
        """Start the engine, then the worker. Raises `DeadlineExceeded` where Redis or the engine does not come up."""
        await wait_for_redis(self.redis, REDIS_START_S)
        await self.engine.start()
        self._work = asyncio.create_task(self._run(), name="worker")
        self._started = True
        log.info("replica %s takes leases of run %s", self.name, self.config.run.name)

    async def _run(self) -> None:
        """Run the worker until it ends or the engine dies, be it idle. Raises `EngineDead`."""
        death = asyncio.create_task(self.engine.died(), name="the engine's death")
        death.add_done_callback(lambda _: self.worker.stop())
        try:
            await self.worker.run()
            if death.done():
                raise EngineDead(f"replica {self.name}: a process of its engine has ended")
        finally:
            death.cancel()

    async def wait(self) -> None:
        """Wait until the worker has ended; raises what ended it."""
        if self._work is not None:
            await asyncio.shield(self._work)

    async def stop(self) -> None:
        """Hand unfinished episodes over, then end the engine."""
        self.worker.stop()
        if self._work is not None:
            await asyncio.wait({self._work}, timeout=3 * self.config.rollout.stop_timeout_s)
        self.engine.close()
        await self.sandbox.aclose()
        await self._probe.aclose()
        await self.redis.aclose()

    async def control(self, action: Control) -> dict[str, Any]:
        """Do as the operator says, on this replica: see `api.ControlRequest`. Returns what it is like afterwards."""
        if action == "refresh":
            await self.weights.refresh()
        else:
            await self.worker.heed_operator()
        log.info("replica %s: %s", self.name, action)
        return {"replica": self.name, **self.worker.report()}

    async def control_run(self, action: Control) -> list[dict[str, Any]]:
        """Have every replica of the run do as the operator says.

        A pause stands in Redis until it is resumed: whoever cannot be reached now, or starts later, finds it there.

        Returns:
            what the replicas that were reached are like afterwards.
        """
        key = self.worker.consumer.keys.rollout_paused
        if action == "pause":
            await self.redis.set(key, 1)
        elif action == "resume":
            await self.redis.delete(key)
        return await self.broadcast(action)

    async def set_cap(self, replicas: int) -> None:
        """Tell `scaling.FillNodes` how many replicas the run may have."""
        await self.redis.set(self.worker.consumer.keys.rollout_cap, replicas)

    @property
    def waiting_for(self) -> str | None:
        """What is missing before the replica is ready; None if nothing is."""
        if not self._started:
            return "the engine to start"
        if self._work is not None and self._work.done():
            return "a restart: the worker has ended"
        return self.weights.waiting_for

    async def check_health(self) -> None:
        """Raise `EngineDead` if the engine is dead or hung, or the worker has failed.

        A busy replica is healthy, and one that has handed over and waits for its end.
        """
        ended = self._work is not None and self._work.done() and not self._work.cancelled()
        if self._work is not None and ended and (error := self._work.exception()) is not None:
            raise EngineDead(f"replica {self.name}: the worker has failed: {error!r}")
        if self._started:
            await self.engine.check_health()

    async def run_episode(
        self, question: str, answer: str, source: str, environment: str, sampling: Sampling
    ) -> dict[str, Any]:
        """Run one episode outside of any lease and tell everything about it.

        Returns:
            ``{replica, reward, end_reason, turns, tool_calls, seconds, text, segments}``; a segment has kind, text,
            token_ids, and, where the policy wrote it, logprobs, version, lineage and replica.

        Raises:
            KeyError, ConfigError: the environment or its grader is not known.
            PromptTooLong: there is no room for a response.
            NothingSampled: the wall time passed before the first token.
            SandboxError: the sandbox failed.
            EngineDead: the engine failed.
            Exception: whatever the environment and its grader raise, and `BadReward`.
        """
        lease = Lease(
            lease_id=f"evaluate:{uuid.uuid4().hex[:8]}:1",
            prompt_id="http",
            question=question,
            answer=answer,
            source=source,
            environment=environment,
            v_hat=0.5,
            version=0,
            sampling=sampling,
            issued_at_s=time.time(),
        )
        chosen = self.environment(environment)
        episode = Episode(lease, chosen, self.engine, self.tools(), self.config.rollout, self.name, asyncio.Event())
        finished = await episode.run()
        assert isinstance(finished, Finished)  # noqa: S101  nothing interrupts it
        return {
            "replica": self.name,
            "reward": await reward_of(chosen, finished),
            "end_reason": finished.end_reason,
            "turns": finished.turns,
            "tool_calls": [call.model_dump() for call in finished.tool_calls],
            "seconds": time.time() - finished.started_at_s,
            "text": finished.response.text,
            "segments": [self._segment(segment) for segment in finished.segments],
        }

    def _segment(self, segment: Any) -> dict[str, Any]:
        told = {
            "kind": segment.kind,
            "text": self.tokenizer.decode(segment.token_ids.tolist(), skip_special_tokens=False),
            "token_ids": segment.token_ids.tolist(),
        }
        if segment.kind == "generated":
            told |= {
                "logprobs": segment.logprobs.tolist(),
                "version": segment.version,
                "lineage": segment.lineage,
                "replica": segment.replica,
            }
        return told
