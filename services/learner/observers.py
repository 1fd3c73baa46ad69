"""What watches a run beside its records: a line on a terminal, TensorBoard, and Weights & Biases where it is asked for.

Whatever fails here is counted and told once; training goes on.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from singlestream.config import Config
from singlestream.errors import ConfigError

log = logging.getLogger(__name__)

LINE = (
    "reward {task.fields[reward]:.3f}  staleness {task.fields[staleness]:.2f}  {task.fields[tokens]:,.0f} tokens/s  "
    "idle {task.fields[idle]:.0%}"
)


class Observer(Protocol):
    """Something that is shown every step's record."""

    def observe(self, record: dict[str, Any]) -> None:
        """Show a record of ``steps.jsonl``; None stands for a number that is not finite."""

    def close(self) -> None:
        """Write out what is buffered."""


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The record's numbers but its step, by the names that trackers show."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    return {f"learner/{name}": value for name, value in numbers.items()}


class TensorBoard:
    """Every step's record as one point of each number's curve.

    Args:
        folder: of the run.
        step: steps taken before; what an earlier start wrote beyond them is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def observe(self, record: dict[str, Any]) -> None:
        """Add a step's record."""
        for name, value in _numbers(record).items():
            self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write out what is buffered."""
        self._board.close()


class ProgressLine:
    """One line that moves with the steps, where standard error is a terminal; log lines go on above it.

    Args:
        step: steps taken before.
        total_steps: of the run.
        console: where to; None means standard error.
    """

    def __init__(self, step: int, total_steps: int, console: Console | None = None) -> None:
        self._stderr = sys.stderr
        console = console or Console(stderr=True)
        columns = (TextColumn("learner"), BarColumn(20), MofNCompleteColumn(), TextColumn(LINE), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        fields: dict[str, Any] = {"reward": 0.0, "staleness": 0.0, "tokens": 0.0, "idle": 0.0}
        self._task = self._progress.add_task("steps", total=total_steps, completed=step, **fields)
        self._progress.start()
        if sys.stderr is not self._stderr:  # rich took it over, so that lines do not tear the one that moves
            self._redirect(self._stderr, sys.stderr)

    def _redirect(self, old: Any, new: Any) -> None:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)

    def observe(self, record: dict[str, Any]) -> None:
        """Show a step's record."""
        self._progress.update(
            self._task,
            completed=record["step"],
            reward=record["reward_mean"] or 0.0,
            staleness=record["staleness_mean"] or 0.0,
            tokens=record["tokens_per_s"] or 0.0,
            idle=record["learner_idle_ratio"] or 0.0,
        )

    def close(self) -> None:
        """Leave the last line standing."""
        taken = sys.stderr
        self._progress.stop()
        self._redirect(taken, self._stderr)


class WeightsAndBiases:
    """Every step's record as one point of a Weights & Biases run.

    Args:
        project: of Weights & Biases.
        name: of the run.
        folder: holds wandb's own files.

    Its own environment variables hold (``WANDB_MODE=offline``, ``WANDB_API_KEY``). After a restart from a checkpoint
    the same run goes on; steps that it has already are not taken twice.

    Raises:
        ConfigError: wandb is not installed, or does not begin.
    """

    def __init__(self, project: str, name: str, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("learner.wandb_project needs wandb: pip install 'singlestream[wandb]'") from error
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(project=project, name=name, id=name, resume="allow", dir=folder)
        except (wandb.Error, OSError) as error:
            raise ConfigError(f"learner.wandb_project: Weights & Biases does not begin: {error}") from error

    def observe(self, record: dict[str, Any]) -> None:
        """Send a step's record."""
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Observers:
    """Several observers by name, none of which can end the run.

    Args:
        observers: by the name that the log calls each.
        count: told the name at every failure.
    """

    def __init__(self, observers: dict[str, Observer], count: Callable[[str], None]) -> None:
        self._all, self._count = observers, count
        self._failures: Counter[str] = Counter()

    def observe(self, record: dict[str, Any]) -> None:
        """Pass on a record of ``steps.jsonl``."""
        for name, one in self._all.items():
            self._attempt(name, lambda one=one: one.observe(record))  # type: ignore[misc]

    def close(self) -> None:
        """Close all of them."""
        for name, one in self._all.items():
            self._attempt(name, one.close)

    def _attempt(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # the boundary to what only watches
            self._failures[name] += 1
            self._count(name)
            if self._failures[name] == 1:
                reason = f"{type(error).__name__}: {error}"
                log.warning("%s failed, training goes on; further failures are only counted: %s", name, reason)


def observers_of(config: Config, step: int) -> dict[str, Observer]:
    """The observers that the settings ask for.

    Args:
        config: of the run.
        step: steps taken before.

    Raises:
        ConfigError: a new run asks for Weights & Biases and cannot have it; a run that goes on does so without.
    """
    chosen: dict[str, Observer] = {"TensorBoard": TensorBoard(config.run.dir, step)}
    if project := config.learner.wandb_project:
        try:
            chosen["Weights & Biases"] = WeightsAndBiases(project, config.run.name, config.run.dir)
        except ConfigError as error:
            if step == 0:
                raise
            log.warning("%s; the run goes on without it", error)
    # last, so that it is there only once nothing can be refused any more
    chosen["progress line"] = ProgressLine(step, config.run.total_steps)
    return chosen
