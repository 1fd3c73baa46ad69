"""The drift clock: how far the policy has moved, as one number z for each version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


class UnknownVersions(Exception):
    """Evidence names policy versions whose z has not been looked up yet.

    Args:
        versions: what to look up.
    """

    def __init__(self, versions: set[int]) -> None:
        super().__init__(f"z of versions {sorted(versions)} has not been looked up")
        self.versions = versions


class DriftClock:
    """z of every published version. The first z written for a version stays; `now` goes back where the learner does.

    Args:
        z: version → z as Redis holds them.
    """

    def __init__(self, z: Mapping[int, float] | None = None) -> None:
        self._z = dict(z or {})
        self._absent: set[int] = set()
        self.version: int | None = None

    def __len__(self) -> int:
        return len(self._z)

    def __contains__(self, version: int) -> bool:
        return version in self._z

    def observe(self, version: int, z: float) -> None:
        """Note a version's z. A version seen before keeps its first z."""
        self._z.setdefault(version, z)

    def miss(self, version: int) -> None:
        """Note that Redis has no z for a version either: `z_of` an older one stands in for it."""
        self._absent.add(version)

    def require(self, versions: Iterable[int]) -> None:
        """Raise `UnknownVersions` where z of a version has neither been observed nor been found absent."""
        unknown = {version for version in versions if version not in self._z} - self._absent
        if unknown:
            raise UnknownVersions(unknown)

    def publish(self, version: int, z: float) -> None:
        """Note the version that the learner published last.

        `now` is its z, also after the learner has gone back to an older one.
        """
        self.observe(version, z)
        self.version = version

    @property
    def now(self) -> float:
        """Coordinate z of the version published last; before that the greatest z known, or 0."""
        if self.version is not None:
            return self._z[self.version]
        return max(self._z.values(), default=0.0)

    def z_of(self, version: int) -> float:
        """Coordinate z of a version; without one, that of the nearest older version that has one, else 0."""
        if version in self._z:
            return self._z[version]
        older = [known for known in self._z if known < version]
        return self._z[max(older)] if older else 0.0

    def lookup(self, versions: NDArray[np.int64]) -> NDArray[np.float64]:
        """`z_of` for an array of versions."""
        distinct, where = np.unique(versions, return_inverse=True)
        return np.array([self.z_of(int(version)) for version in distinct], np.float64)[where]

    def items(self) -> list[tuple[int, float]]:
        """(version, z), by version."""
        return sorted(self._z.items())
