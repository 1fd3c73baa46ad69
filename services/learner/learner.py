"""The learner of one run: its parts, put together, and what a step does with them beside the mathematics."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from services.learner.batches import BatchAssembler, Position, closing
from services.learner.checkpoints import Checkpoints, LearnerState
from services.learner.drift import DriftClock
from services.learner.intake import Intake, StopRequest, StreamReader
from services.learner.metrics import Metrics, MetricsServer
from services.learner.model import full_tensors
from services.learner.policy import Policy, StepResult
from services.learner.publication import remove_older, weights_crc32, write_weights
from services.learner.ranks import Ranks
from services.learner.redis_link import RedisLink, Status
from services.learner.report import Step, Timer
from services.learner.step_log import StepLog
from singlestream.config import Config
from singlestream.contracts import PolicyVersion, Trajectory
from singlestream.errors import SinglestreamError
from singlestream.streams import Keys

log = logging.getLogger(__name__)

MOST_SKIPPED = 3
"""Steps in a row that may be skipped because something was not finite."""
PEER_MARGIN_S = 300.0
"""A collective may take longer than Redis may be away, since rank 0 waits for Redis inside one."""


class NonFiniteSteps(SinglestreamError):
    """Several steps in a row had a loss or gradient that is not finite."""


class Learner:
    """State of the run on this rank, and every effect of a step.

    Args:
        config: of the run.
        ranks: the group.

    Raises:
        ConfigError: the model cannot be used, or the metrics port not be bound.
        CheckpointError: there is a resume pointer, and no checkpoint that can be used.
        DeadlineExceeded: Redis did not answer.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.settings, self.ranks = config, config.learner, ranks
        self.total_steps = config.run.total_steps
        self.stop = StopRequest()
        self.link: RedisLink | None = None
        self._server: MetricsServer | None = None
        self._log: StepLog | None = None
        self._metrics = Metrics()
        if ranks.first:
            status = Status(total_steps=self.total_steps)
            self._server = MetricsServer(self._metrics, status, self.settings.metrics_host, self.settings.metrics_port)
            self.link = RedisLink(config.run.redis_url, Keys(config.run.name), status, self.settings.redis_deadline_s)
        self.policy = Policy(config.run.model, self.settings, config.run.temperature, ranks)
        self.checkpoints = Checkpoints(
            config.run.dir / "checkpoints", config.run.name, self.policy, self.settings.keep_checkpoints
        )
        self.lineage, self.token = self._take_over()
        state = self._resume()
        self.step, self._saved_step = state.step, state.step if state.step else -1
        self.clock = DriftClock(self.settings.d_half, state.z)
        self._skipped = 0
        self._crc32 = 0
        self._checkpoint_s = 0.0
        reader = self._reader(state.position)
        self.intake = Intake(ranks, reader, config.run.staleness_bound, self.settings.probe_tokens, self.stop)
        if ranks.first:
            self._log = StepLog(config.run.dir, self.step)

    def _take_over(self) -> tuple[int, str]:
        answer = b""
        if self.link is not None:
            link = self.link
            lineage = link.call(link.streams.take_over, "the learner's fence")
            link.status.lineage = lineage
            link.start_heartbeat()
            answer = f"{lineage} {link.streams.token}".encode()
        lineage_text, token = self.ranks.broadcast(answer).decode().split()
        return int(lineage_text), token

    def _resume(self) -> LearnerState:
        """Load the checkpoint that the resume pointer names, or begin at step 0."""
        answer = b""
        failure: Exception | None = None
        if self.link is not None:
            streams = self.link.streams
            try:
                pointer = self.link.call(streams.resume_name, "the resume pointer")
                answer = (self.checkpoints.choose(pointer) or "-").encode()
            except SinglestreamError as error:  # the others must hear of it before this rank raises
                failure, answer = error, f"!{error}".encode()
        name = self.ranks.broadcast(answer).decode()
        if name.startswith("!"):
            raise failure or SinglestreamError(f"rank 0 failed: {name[1:]}")
        if name == "-":
            torch.manual_seed(self.config.run.seed)
            return LearnerState(0, 0.0, 0, Position())
        state = self.checkpoints.load(name)
        log.info("resumed from %s: step %d, cursor %s", name, state.step, state.position.cursor)
        return state

    def _reader(self, position: Position) -> StreamReader | None:
        if self.link is None:
            return None
        run = self.config.run
        return StreamReader(
            self.link,
            BatchAssembler(run.train_batch_size, run.staleness_bound, position),
            self.policy.vocabulary,
            self.policy.longest_tokens,
            self.settings.wait_warn_s,
            self.settings.wait_timeout_s,
        )

    def timer(self, wait_s: float) -> Timer:
        """A stopwatch for one step; the checkpoint written since the last one counts into it."""
        checkpoint_s, self._checkpoint_s = self._checkpoint_s, 0.0
        return Timer(wait_s, checkpoint_s)

    def count_step(self, result: StepResult) -> None:
        """Count a step and the batch behind it. Raises `NonFiniteSteps` after three skipped ones in a row."""
        self.step += 1
        self.intake.commit()
        self._skipped = 0 if result.applied else self._skipped + 1
        if self._skipped:
            leases = ", ".join(result.bad_leases) or "none of them alone (the gradient's norm)"
            log.error(
                "step %d skipped: loss %g, gradient norm %g; leases: %s",
                self.step, result.loss, result.grad_norm, leases,
            )  # fmt: skip
        if self._skipped >= MOST_SKIPPED:
            raise NonFiniteSteps(f"{MOST_SKIPPED} steps in a row were not finite; the last is step {self.step}")

    def publish(self, drift: float) -> None:
        """Write this version's weights and announce them. Collective."""
        run = self.config.run
        tensors = full_tensors(self.policy.model, getattr(torch, run.engine_dtype))
        if self.link is None:
            for _ in tensors:
                pass
            return
        link = self.link
        link.status.state = "publishing"
        manifest = write_weights(tensors, run.weights_path, self.step, self.lineage, run.engine_dtype)
        version = PolicyVersion(
            version=self.step,
            lineage=self.lineage,
            z=self.clock.z,
            drift=drift,
            manifest=manifest,
            published_at_s=time.time(),
        )
        link.call(lambda: link.streams.publish(version), f"policy version {self.step}")
        remove_older(run.weights_path)
        self._crc32 = weights_crc32(manifest)
        link.status.step = link.status.version = self.step

    def close_leases(self, trajectories: Sequence[Trajectory]) -> None:
        """Send the posterior update of every trained trajectory; after `publish`, so that its version's z is known."""
        if self.link is not None:
            link = self.link
            updates = [closing(trajectory, "trained") for trajectory in trajectories]
            link.call(lambda: link.streams.send_updates(updates), "posterior updates")

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint every ``checkpoint_every`` steps. Collective."""
        if self.step % self.settings.checkpoint_every == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a checkpoint of the state behind the last step, unless there is one. Collective."""
        if self.step == self._saved_step:
            return
        started = time.monotonic()
        name = self.checkpoints.save(self.step, self.clock.z, self.intake.position, self.token, self._point)
        self._saved_step, self._checkpoint_s = self.step, time.monotonic() - started
        if self.ranks.first:
            log.info("checkpoint %s in %.2f s", name, self._checkpoint_s)

    def _point(self, name: str, oldest_cursor: str) -> None:
        if self.link is not None:
            streams = self.link.streams
            self.link.call(lambda: streams.resume_from(name, oldest_cursor), "the resume pointer")

    def report(self, step: Step) -> None:
        """Write the step's record, metrics and log line."""
        if self.link is None or self._log is None:
            return
        record = self._log.write(step.record(self.step, self.lineage, self.clock.z, self._crc32))
        self._metrics.observe(record)
        self.link.status.reward_mean = record["reward_mean"]
        log.info(
            "step %d/%d reward %.3f staleness %.2f tokens/s %.0f idle %.0f %% loss %.4g drift %.4g",
            self.step, self.total_steps, record["reward_mean"], record["staleness_mean"], record["tokens_per_s"],
            100 * record["learner_idle_ratio"], step.result.loss, step.drift,
        )  # fmt: skip

    def finish(self) -> None:
        """Leave a last checkpoint and say whether the run is over or only stopped. Collective."""
        self.checkpoint()
        if self.link is not None:
            position = self.intake.position
            over = self.step >= self.total_steps or (position is not None and position.ended)
            self.link.status.state = "finished" if over else "stopped"
            self.link.beat_now()
            log.info("%s at step %d of %d", self.link.status.state, self.step, self.total_steps)

    def close(self) -> None:
        """Release port, thread and files."""
        for part in (self._log, self._server, self.link):
            if part is not None:
                part.close()
