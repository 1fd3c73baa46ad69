"""One thread that does what was handed to it, in order, beside the training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

log = logging.getLogger(__name__)


class Background:
    """Runs calls one after the other. After an error nothing more runs, and everyone who looks gets that error.

    Order is the whole point: what is submitted later sees what was submitted earlier done, or does not happen.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: Future[None] | None = None
        self._error: BaseException | None = None

    def submit(self, call: Callable[[], object]) -> None:
        """Queue a call. Raises the error of an earlier one."""
        self.check()
        self._last = self._executor.submit(self._run, call)

    def _run(self, call: Callable[[], object]) -> None:
        if self._error is None:
            try:
                call()
            except BaseException as error:  # the boundary of the thread: the loop raises it
                self._error = error

    def check(self) -> None:
        """Raise the error of an earlier call, if there is one."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until everything submitted so far is done. Raises the error of whichever call failed."""
        last = self._last
        if last is not None:
            last.result()
        self.check()

    def close(self) -> None:
        """Finish what was submitted, and end the thread; an error is logged: perhaps nobody has seen it."""
        self._executor.shutdown(wait=True)
        if self._error is not None:
            log.error("the work beside the loop ended with %s: %s", type(self._error).__name__, self._error)
