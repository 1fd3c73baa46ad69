"""Cut tool output to a length that fits a context."""

from __future__ import annotations

from typing import Literal

MARK = "…"


def truncate(text: str, max_chars: int, drop: Literal["left", "right", "middle"]) -> str:
    """``text`` in at most ``max_chars`` characters, with `MARK` where something was left out.

    Args:
        text: what the tool said.
        max_chars: at least 1; the mark counts.
        drop: the part to leave out: ``left`` keeps the end, ``right`` the beginning, ``middle`` both.
    """
    if len(text) <= max_chars:
        return text
    keep = max_chars - len(MARK)
    if drop == "left":
        return MARK + text[len(text) - keep :]
    if drop == "right":
        return text[:keep] + MARK
    head = (keep + 1) // 2
    return text[:head] + MARK + text[len(text) - (keep - head) :]
