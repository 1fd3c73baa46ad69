"""When other services' reports came in, by this process's clock: theirs may be wrong, and liveness must not be.

A report is new when it says another time than the one before, whatever time that is.
"""

from __future__ import annotations

from collections.abc import Mapping


class Receipts:
    """The last report of each sender. No clock inside."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] | None = None

    def note(self, said_at_s: Mapping[str, float], now_s: float) -> dict[str, float]:
        """Take the reports as they stand now; returns when each one came in, Unix seconds of this clock.

        At the first look nothing is known of the reports but what they say: so they are taken at their word, but not
        from the future.

        Args:
            said_at_s: sender → Unix time that its report carries, by the sender's clock.
            now_s: Unix time.
        """
        before, first = self._seen or {}, self._seen is None
        self._seen = {}
        for name, said_s in said_at_s.items():
            last_s, came_s = before.get(name, (None, 0.0))
            if said_s != last_s:
                came_s = min(said_s, now_s) if first else now_s
            self._seen[name] = (said_s, came_s)
        return {name: came_s for name, (_, came_s) in self._seen.items()}
