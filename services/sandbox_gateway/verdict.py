"""From what the kernel and the gateway saw to an outcome: a pure function, tested without a process.

The status rests on the wait status and on the gateway's own reason for a kill. The snippet's report refines one failure
into another (``error`` into ``memory_limit``) and fills ``error``; it can turn no failure into ``ok`` and nothing into
a fault of the sandbox.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any, Literal

from services.sandbox_gateway.inside.messages import read_report
from singlestream.contracts.sandbox import ErrorReport, RunStatus

KillReason = Literal["timeout", "output_limit"]
"""Why the gateway killed a run."""


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    wait_status: int
    """The kernel's, from wait4."""
    kill_reason: KillReason | None
    """The gateway's reason, None if it killed nothing."""
    cpu_s: float
    """CPU seconds used."""
    cpu_limit_s: int
    """RLIMIT_CPU of the run."""
    report: bytes
    """The page on which the snippet may have left its uncaught exception: hostile bytes."""


@dataclass(frozen=True)
class Verdict:
    """The outcome, as the API gives it."""

    status: RunStatus
    exit_code: int | None
    signal: int | None
    error: ErrorReport | None


def judge(ending: Ending) -> Verdict:
    """Decide a run's outcome."""
    if os.WIFSIGNALED(ending.wait_status):
        number = os.WTERMSIG(ending.wait_status)
        return Verdict(_killed_status(ending, number), None, number, None)
    exit_code = os.WEXITSTATUS(ending.wait_status)
    if exit_code == 0:
        return Verdict("ok", 0, None, None)
    report = read_report(ending.report)
    status: RunStatus = "memory_limit" if report.get("memory") is True else "error"
    return Verdict(status, exit_code, None, _error(report))


def _killed_status(ending: Ending, number: int) -> RunStatus:
    if number == signal.SIGXCPU:
        return "timeout"
    if number != signal.SIGKILL:
        return "killed"
    if ending.kill_reason is not None:
        return ending.kill_reason
    # A run that ignores SIGXCPU meets the kernel's SIGKILL. Its clock for limits counts ticks and may run some tenths
    # ahead of the one that wait4 reports.
    return "timeout" if ending.cpu_s >= 0.8 * ending.cpu_limit_s else "killed"


def _error(report: dict[str, Any]) -> ErrorReport | None:
    kind, message, line = report.get("type"), report.get("message"), report.get("line")
    if not isinstance(kind, str) or not isinstance(message, str):
        return None
    valid_line = line if isinstance(line, int) and not isinstance(line, bool) and 0 <= line < 2**31 else None
    return ErrorReport(type=_clean(kind), message=_clean(message), line=valid_line)


def _clean(text: str) -> str:
    """Text that can be sent: JSON may carry lone surrogates, UTF-8 may not."""
    return text.encode("utf-8", "replace").decode("utf-8")
