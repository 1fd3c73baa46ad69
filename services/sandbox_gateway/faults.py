"""What can go wrong with the sandbox itself, and whether it may pass.

The difference decides what becomes of the gateway: it gives up for good where the host is unfit, and is started again
where the host was only busy.
"""

from __future__ import annotations

import errno
import os

PASSING = (
    *(os.strerror(code) for code in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)),
    "MemoryError",
    "timed out",
)
"""Parts of messages that tell of a lack of memory, processes, descriptors or time at one moment."""


class SandboxFault(Exception):
    """The sandbox itself failed, and with it a run or a start; the text says how. It may work the next time."""


class IsolationUnavailable(SandboxFault):
    """This host does not isolate, now or at the next try; the text says what it lacks."""


def fault_of(what: str, said: str) -> SandboxFault:
    """The fault behind a reason that the kernel, bubblewrap or a zygote gave.

    A refusal is the host's, unless it names a passing lack. Who is killed gives no reason.

    Args:
        what: what happened.
        said: the reason; may be empty.
    """
    passes = not said or any(part in said for part in PASSING)
    return (SandboxFault if passes else IsolationUnavailable)(f"{what}: {said or 'without a word'}")
