"""Who runs now, who waits, who is refused: a pure state machine without clock, tasks or clients.

Fair by order of arrival. A request that asks for more memory than one slot's share takes several slots, so that all
running requests together map no more than the memory that was checked at start. What they keep in ``/tmp``, 32 MiB each
at most, comes out of that check's reserve; should many fill theirs at once, the kernel kills a run, not the gateway.
The head of the queue is never overtaken by a smaller request, so a large one cannot starve.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

Decision = Literal["run", "wait", "refuse"]
"""What becomes of a new request."""


class Admission:
    """Slots and a bounded FIFO queue.

    Args:
        slots: runs of the usual size at a time.
        queue_limit: requests that may wait.

    Example:
        >>> admission = Admission(slots=1, queue_limit=1)
        >>> admission.offer(1), admission.offer(2), admission.offer(3)
        ('run', 'wait', 'refuse')
        >>> admission.leave(1)
        [2]
    """

    def __init__(self, slots: int, queue_limit: int) -> None:
        self.slots = slots
        """Slots in total."""
        self._queue_limit = queue_limit
        self._running: dict[int, int] = {}
        self._waiting: OrderedDict[int, int] = OrderedDict()

    @property
    def running(self) -> int:
        """Requests that hold slots."""
        return len(self._running)

    @property
    def used_slots(self) -> int:
        """Slots held."""
        return sum(self._running.values())

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def offer(self, ticket: int, weight: int = 1) -> Decision:
        """A new request asks in.

        Args:
            ticket: its number, not used before.
            weight: slots it takes, 1 to ``slots``.

        Raises:
            ValueError: the weight is out of range; such a request could wait for ever.
        """
        if not 1 <= weight <= self.slots:
            raise ValueError(f"a request cannot take {weight} of {self.slots} slots")
        if not self._waiting and self.used_slots + weight <= self.slots:
            self._running[ticket] = weight
            return "run"
        if len(self._waiting) >= self._queue_limit:
            return "refuse"
        self._waiting[ticket] = weight
        return "wait"

    def leave(self, ticket: int) -> list[int]:
        """A request is done, gave up waiting, or is gone; leaving twice changes nothing.

        Returns:
            Tickets that may run now.
        """
        self._running.pop(ticket, None)
        self._waiting.pop(ticket, None)
        started = []
        while self._waiting:
            head, weight = next(iter(self._waiting.items()))
            if self.used_slots + weight > self.slots:
                break
            del self._waiting[head]
            self._running[head] = weight
            started.append(head)
        return started

    def drop_waiting(self) -> list[int]:
        """Empty the queue (the gateway is stopping) and return who was in it."""
        dropped = list(self._waiting)
        self._waiting.clear()
        return dropped
