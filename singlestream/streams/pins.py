"""A pinned evaluation under way: which job, on which policy version, on which replicas.

The value store writes it, replicas read it. A replica that is named holds its weights and takes evaluation leases
alone until it is named no longer.

>>> Pin.parse(Pin("0123456789ab", ("r1",), 7, 1).text()) == Pin("0123456789ab", ("r1",), 7, 1)
True
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Pin:
    """The pinned evaluation under way.

    Args:
        job: its number.
        replicas: names of those that take part.
        version: policy version of every token; None until the first replica asked has said what it holds.
        lineage: of that version.
    """

    job: str
    replicas: tuple[str, ...] = ()
    version: int | None = None
    lineage: int | None = None

    @property
    def policy(self) -> tuple[int, int] | None:
        """(version, lineage) once it is known."""
        return None if self.version is None or self.lineage is None else (self.version, self.lineage)

    def text(self) -> str:
        """As it stands in Redis."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str | bytes | None) -> Pin | None:
        """Inverse of `text`; None for nothing, or for what is none."""
        try:
            fields = json.loads(text) if text else None
            return cls(**{**fields, "replicas": tuple(fields["replicas"])}) if fields else None
        except (ValueError, KeyError, TypeError):
            return None
