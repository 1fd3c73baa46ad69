"""The demo's report: curves from the step log, the before/after table, and example episodes, in one HTML file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure

PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward and baseline", (("reward_mean", "mean reward"), ("v_hat_mean", "mean v̂ at the lease"))),
    ("Tool use", (("tool_calls_mean", "tool calls per trajectory"),)),
    ("Staleness in optimizer updates", (("staleness_mean", "mean"), ("staleness_max", "max"))),
    ("Learner idle share", (("learner_idle_ratio", "waiting / step time"),)),
)
"""Title, and (key in the step log, label) of each curve."""


def curves_svg(steps: Sequence[dict[str, Any]]) -> str:
    """One SVG with a panel for each entry of `PANELS`.

    Args:
        steps: the objects of ``steps.jsonl``, in order; at least one.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    x = [step["step"] for step in steps]
    for axis, (title, lines) in zip(axes.flat, PANELS, strict=True):
        for key, label in lines:
            axis.plot(x, [step[key] for step in steps], label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def write_report(
    path: Path, summary: dict[str, Any], steps: Sequence[dict[str, Any]], episodes: Sequence[dict[str, Any]]
) -> None:
    """Write the HTML file.

    Args:
        path: target.
        summary: what ``summary.json`` holds.
        steps: the objects of ``steps.jsonl``.
        episodes: traces of ``POST /v1/episodes``: question, answer, reward, end_reason and segments with text.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.j2").render(
        summary=summary, steps=steps, episodes=episodes, curves=curves_svg(steps)
    )
    path.write_text(html)
