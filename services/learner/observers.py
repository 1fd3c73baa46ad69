"""What watches a run beside the files: a line on a terminal, and Weights & Biases where a project is named."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from singlestream.config import Config
from singlestream.errors import ConfigError

log = logging.getLogger(__name__)

LINE = (
    "reward {task.fields[reward]:.3f}  staleness {task.fields[staleness]:.2f}  {task.fields[tokens]:,.0f} tokens/s  "
    "idle {task.fields[idle]:.0%}"
)


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
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._run.log({f"learner/{name}": value for name, value in numbers.items()}, step=record["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Observers:
    """All of them, as the settings say.

    Args:
        config: of the run.
        step: steps taken before.
    """

    def __init__(self, config: Config, step: int) -> None:
        self._all: list[ProgressLine | WeightsAndBiases] = []
        if project := config.learner.wandb_project:
            self._all.append(WeightsAndBiases(project, config.run.name, config.run.dir))
        self._all.append(ProgressLine(step, config.run.total_steps))

    def observe(self, record: dict[str, Any]) -> None:
        """Pass on a record of ``steps.jsonl``; None stands for a number that is not finite."""
        for one in self._all:
            one.observe(record)

    def close(self) -> None:
        """Close all of them."""
        for one in self._all[::-1]:
            one.close()
