"""What an attack is, and how those of one kind are written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

NATIVE = """
import ctypes, os, errno
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    return libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
def refused(*arguments):
    ctypes.set_errno(0)
    result = call(*arguments)
    return result < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)
"""


@dataclass(frozen=True)
class Attack:
    """A snippet.

    Args:
        name: of the test.
        code: the snippet.
        statuses: one of these must come of it.
        stdout: exactly this must have been printed; None: anything.
        request: further fields of the request.
    """

    name: str
    code: str
    statuses: tuple[str, ...] = ("ok",)
    stdout: str | None = "held\n"
    request: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", dedent(self.code))


def endless(name: str, code: str, **request: Any) -> Attack:
    """One that ends at its time-out; what it printed before must be there."""
    return Attack(name, f"print('before')\n{dedent(code)}", ("timeout",), "before\n", {"timeout_s": 0.7, **request})


def raising(name: str, code: str, *exceptions: str) -> Attack:
    """One whose every statement, run alone, must raise one of the exceptions."""
    names = ", ".join(exceptions or ("OSError",))
    body = f"""
import os, sys, socket, ctypes
free = []
for line in {[line for line in dedent(code).strip().splitlines()]!r}:
    try:
        exec(line, globals())
    except ({names}):
        continue
    free.append(line)
print(free or 'held')
"""
    return Attack(name, body)


def refused(name: str, *calls: str) -> Attack:
    """System calls, each of which must be refused by the filter."""
    listed = ", ".join(f"refused({c})" for c in calls)
    return Attack(name, f"{NATIVE}\nanswers = [{listed}]\nprint('held' if all(answers) else answers)")
