"""How long the oldest entry of each stream has been waiting, by Redis' own clock, which also made its number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OLDEST = """
-- KEYS: streams   ARGV: for each one the last entry that does not count any more   returns ms, 0 where none waits
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local ages = {}
for i = 1, #KEYS do
  local first = redis.call('XRANGE', KEYS[i], '(' .. ARGV[i], '+', 'COUNT', 1)[1]
  ages[i] = first and math.max(0, now_ms - tonumber(string.match(first[1], '^%d+'))) or 0
end
return ages
"""
"""A script, since an entry's number is wanted without its message, which may be a whole trajectory."""


def ask_oldest(pipe: Any, applied: Mapping[str, str]) -> None:
    """Queue the question: stream → its last entry that has been applied (``0-0``: none). Its reply is in ms."""
    pipe.eval(OLDEST, len(applied), *applied.keys(), *applied.values())
