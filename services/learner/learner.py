"""The learner of one run: its parts, put together, and what a step does with them beside the mathematics."""

from __future__ import annotations

import json
import logging
import time

import torch

from services.learner.anchors import ExactDrift, measure
from services.learner.background import Background
from services.learner.batches import BatchAssembler, Position, closing_update
from services.learner.checkpoints import Checkpoints, LearnerState
from services.learner.drift import DriftClock, Probe, make_probe
from services.learner.intake import Batch, Intake, StopRequest, StreamReader
from services.learner.metrics import Metrics, MetricsServer
from services.learner.model import full_tensors
from services.learner.observers import Observers, observers_of
from services.learner.policy import Policy, StepResult
from services.learner.publisher import Publisher
from services.learner.ranks import Ranks
from services.learner.redis_link import RedisLink, Status
from services.learner.report import Step, Timer
from services.learner.step_log import StepLog
from services.learner.weights_http import WeightFiles
from singlestream.config import Config
from singlestream.contracts import parse_lease_id
from singlestream.errors import SinglestreamError
from singlestream.streams import Keys
from singlestream.streams.anchors import is_anchored

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
        self._observers: Observers | None = None
        self._metrics = Metrics()
        self._beside = Background("publish")
        files = WeightFiles.of(config)
        if ranks.first:
            status = Status(total_steps=self.total_steps)
            settings = self.settings
            self._server = MetricsServer(self._metrics, status, settings.metrics_host, settings.metrics_port, files)
            self.link = RedisLink(config.run.redis_url, Keys(config.run.name), status, settings.redis_deadline_s)
            self.link.checks.append(self._beside.check)
        self.policy = Policy(config.run.model, self.settings, config.run.temperature, ranks)
        self.checkpoints = Checkpoints(config, self.policy)
        if self.link is not None:
            self.link.checks.append(self.checkpoints.check)
        self.lineage, self.token = self._take_over()
        state = self._resume()
        self.step, self._saved_step = state.step, state.step if state.step else -1
        self.clock = DriftClock(self.settings.d_half, state.z, state.step, self._written_clock())
        self._skipped = 0
        self._noise: float | None = None
        self._publisher = Publisher(config, self.lineage, self.link, files) if self.link is not None else None
        self._checkpoint_s = 0.0
        reader = self._reader(state.position)
        bound, tokens = config.run.staleness_bound, self.settings.probe_tokens
        self.intake = Intake(ranks, reader, bound, tokens, config.anchor_share, self.stop)
        if ranks.first:
            self._log = StepLog(config.run.dir, self.step)
            self._observers = Observers(observers_of(config, self.step), self._metrics.count_tracking_failure)

    def _take_over(self) -> tuple[int, str]:
        """Take the fence; returns this start's lineage and token, the same on every rank. Collective."""

        def take_over() -> bytes:
            assert self.link is not None  # noqa: S101  rank 0's
            link = self.link
            if not link.call(link.streams.is_known, "the run's lineage"):
                self.checkpoints.refuse_unknown()
            lineage = link.call(link.streams.take_over, "the learner's fence")
            link.status.lineage = lineage
            link.start_heartbeat()
            self.checkpoints.remove_partials()
            return f"{lineage} {link.streams.token}".encode()

        lineage, token = self.ranks.from_first(take_over).decode().split()
        return int(lineage), token

    def _resume(self) -> LearnerState:
        """Load the checkpoint that the resume pointer names, or begin at step 0. Collective."""

        def pointer() -> bytes:
            assert self.link is not None  # noqa: S101  rank 0's
            return (self.link.call(self.link.streams.resume_name, "the resume pointer") or "").encode()

        name = self.checkpoints.choose(self.ranks.from_first(pointer).decode() or None)
        if name is None:
            torch.manual_seed(self.config.run.seed)
            return LearnerState(0, 0.0, 0, Position())
        state = self.checkpoints.load(name)
        log.info("resumed from %s: step %d, cursor %s", name, state.step, state.position.cursor)
        return state

    def _written_clock(self) -> dict[int, float]:
        """Version → z as Redis has it, the same on every rank. Collective."""

        def read() -> bytes:
            assert self.link is not None  # noqa: S101  rank 0's
            return json.dumps(self.link.call(self.link.streams.drift_clock, "the drift clock")).encode()

        return {int(version): z for version, z in json.loads(self.ranks.from_first(read)).items()}

    def _reader(self, position: Position) -> StreamReader | None:
        if self.link is None:
            return None
        run, size = self.config.run, self.config.value_store.group_size
        total = run.total_steps * run.train_batch_size if size > 1 else None
        return StreamReader(
            self.link,
            BatchAssembler(run.train_batch_size, run.staleness_bound, position, size, total),
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
        """Take a snapshot of this version's weights; it is checked and announced beside the next step. Collective.

        Raises the error of what was left to do beside the step before.
        """
        tensors = full_tensors(self.policy.model, getattr(torch, self.config.run.engine_dtype))
        if self.link is None or self._publisher is None:
            for _ in tensors:
                pass
            return
        publisher, z = self._publisher, self.clock.z
        self.link.status.state, self.link.status.step = "publishing", self.step
        self._beside.wait()  # one version at a time, which bounds the memory
        snapshot = publisher.snapshot(tensors, self.step)
        self._beside.submit(lambda: publisher.announce(snapshot, z, drift))

    def probe(self, batch: Batch) -> Probe:
        """Score the drift clock's probe; at the first step of a start twice, for the noise floor. Collective."""
        probe = make_probe(self.policy, batch.upcoming, batch.samples, self.settings.probe_tokens)
        if self._noise is None:
            self._noise = probe.drift()
        return probe

    def exact_drift(self, batch: Batch) -> ExactDrift:
        """Measure D where a previous response is kept, and score the responses to be kept. Collective."""
        keep_N = [is_anchored(sample.prompt_id, self.config.anchor_share) for sample in batch.samples]
        return measure(self.policy, batch.samples, batch.anchors, keep_N, self.step, self.clock.z)

    def close_leases(self, batch: Batch, exact: ExactDrift) -> None:
        """Send the posterior update of every trained trajectory, once its version is announced and its z known.

        What is kept of them goes before, so that it is there when the value store counts the update.
        """
        if self.link is None:
            return
        link, most_bytes = self.link, self.settings.anchor_bytes
        pairs = zip(batch.trajectories, exact.drift_N, strict=True)
        updates = [closing_update(trajectory, "trained", drift) for trajectory, drift in pairs]
        # a script of the value store counts each prompt once: so first members of all groups, then second ones
        size = self.config.value_store.group_size
        updates.sort(key=lambda update: (parse_lease_id(update.lease_id)[2] - 1) % size)
        kept = [(anchor.sample.lease_id, anchor.pack()) for anchor in exact.kept]

        def close() -> None:
            if kept:
                link.call(lambda: link.streams.put_anchors(kept, most_bytes), "anchors")
            link.call(lambda: link.streams.send_updates(updates), "posterior updates")

        self._beside.submit(close)

    def checkpoint_if_due(self) -> None:
        """Begin a checkpoint every ``checkpoint_every`` steps; it is written beside the next. Collective."""
        if self.step % self.settings.checkpoint_every == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Begin a checkpoint of the state behind the last step, unless there is one. Collective."""
        if self.step == self._saved_step:
            return
        started = time.monotonic()
        self.checkpoints.save(self.step, self.clock.z, self.intake.position, self.token, self._point)
        self._saved_step, self._checkpoint_s = self.step, time.monotonic() - started

    def _point(self, name: str, oldest_cursor: str) -> None:
        if self.link is not None:
            assert self._log is not None  # noqa: S101  rank 0's
            streams = self.link.streams
            # a resume does not announce, close or log again what lies before its checkpoint
            self._beside.wait()
            self._log.sync()
            self.link.call(lambda: streams.resume_from(name, oldest_cursor), "the resume pointer")

    def report(self, step: Step) -> None:
        """Write the step's record, metrics and log line, once its version is announced."""
        if self.link is not None:
            number, z = self.step, self.clock.z
            self._beside.submit(lambda: self._record(step, number, z))

    def _record(self, step: Step, number: int, z: float) -> None:
        publisher = self._publisher
        assert self._log is not None and self.link is not None and publisher is not None  # noqa: S101  rank 0's
        assert self._observers is not None  # noqa: S101  rank 0's
        fields = step.record(number, self.lineage, z, publisher.crc32)
        fields |= {
            "drift_noise": self._noise,
            "publication_s": round(publisher.seconds, 3),
            "delta_ratio": publisher.delta_ratio,
            "mfu": self.policy.model_flops_share(step.batch.samples, step.seconds["forward_backward"]),
        }
        record = self._log.write(fields, step.evidence(number))
        for observer in (self._metrics, self._observers):
            observer.observe(record)
        self.link.status.reward_mean = record["reward_mean"]
        log.info(
            "step %d/%d reward %.3f staleness %.2f tokens/s %.0f idle %.0f %% loss %.4g drift %.4g",
            number, self.total_steps, record["reward_mean"], record["staleness_mean"], record["tokens_per_s"],
            100 * record["learner_idle_ratio"], step.result.loss, step.drift,
        )  # fmt: skip

    def finish(self) -> None:
        """Leave a last checkpoint and say whether the run is over or only stopped. Collective."""
        self.checkpoint()
        self.checkpoints.settle()
        if self.link is not None:
            self._beside.wait()
            over = self.step >= self.total_steps or self.intake.ended
            self.link.status.state = "finished" if over else "stopped"
            self.link.beat_now()
            log.info("%s at step %d of %d", self.link.status.state, self.step, self.total_steps)

    def close(self) -> None:
        """Finish what is left to do beside the loop; release port, threads and files.

        All are closed; raises the error of the one that failed, or of all that did as a group.
        """
        beside = (self.checkpoints, self._beside, self._publisher)
        errors: list[Exception] = []
        for part in (*beside, self._log, self._observers, self._server, self.link):
            try:
                if part is not None:
                    part.close()
            except Exception as error:  # the others must be closed too
                errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else ExceptionGroup("several parts could not be closed", errors)
