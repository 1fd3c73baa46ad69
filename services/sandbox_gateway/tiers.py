"""Kinds of zygotes: how much each has imported before its first fork, and which of them suits a snippet.

A fork copies the zygote's page tables, so a zygote that has everything makes every run pay for all of it: a ``print``
takes 3 ms of processor time forked from a bare standard library, 4.5 ms with numpy and sympy, 7 ms with pandas and
scipy's sub-packages. A run goes to the smallest kind that has what its text names. The choice touches speed only: any
zygote runs any snippet, importing what it lacks, so while one kind restarts another stands in.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MATHS_MODULES = frozenset({"numpy", "sympy", "mpmath"})
"""What most mathematical snippets use, and cheap to fork together."""


class Tier(NamedTuple):
    """A kind of zygote."""

    name: str
    """``plain``, ``maths`` or ``libraries``."""
    preload: tuple[str, ...]
    """Modules it imports besides the standard library."""


def tiers_for(preload: tuple[str, ...]) -> tuple[Tier, ...]:
    """The kinds that serve a list of modules, smallest first.

    Example:
        >>> [tier.name for tier in tiers_for(("numpy", "pandas"))]
        ['plain', 'maths', 'libraries']
    """
    maths = tuple(name for name in preload if name.split(".")[0] in MATHS_MODULES)
    tiers = [Tier("plain", ())]
    if maths:
        tiers.append(Tier("maths", maths))
    if set(preload) - set(maths):
        tiers.append(Tier("libraries", preload))
    return tuple(tiers)


class TierChoice:
    """Ranks the kinds for a snippet by the module names in its text.

    Args:
        tiers: smallest first.
    """

    def __init__(self, tiers: tuple[Tier, ...]) -> None:
        self._tiers = tiers
        self._tops = [frozenset(module.split(".")[0] for module in tier.preload) for tier in tiers]
        names = frozenset().union(*self._tops)
        self._pattern = re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, names)))})\b") if names else None

    def ranking(self, code: str) -> list[str]:
        """Names of the kinds, best first: the smallest that has all modules named, then the others from the largest."""
        named = set(self._pattern.findall(code)) if self._pattern is not None else set()
        best = next(i for i, tops in enumerate(self._tops) if named <= tops)
        return [self._tiers[best].name, *(tier.name for i, tier in reversed(list(enumerate(self._tiers))) if i != best)]
