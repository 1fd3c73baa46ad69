"""Anchors: previous responses with their log-probs, which exact drift is measured on.

The learner writes an anchor under its lease before it closes that lease, and only while the lease is outstanding. The
value store makes it the prompt's anchor in the script that applies the closing, and drops the one before. So a prompt's
anchor is always of the lease that its posterior counted last. All anchors together stay within a number of bytes; the
oldest go first.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from redis.asyncio import Redis

from singlestream.streams.keys import Keys

PUT_ANCHORS = """
-- KEYS: fence, anchors, anchor_ages, anchor_counts, outstanding   ARGV: token, bytes at most, (lease, anchor)...
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
for i = 3, #ARGV, 2 do
  if redis.call('HEXISTS', KEYS[5], ARGV[i]) == 1 and redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('ZADD', KEYS[3], redis.call('HINCRBY', KEYS[4], 'written', 1), ARGV[i])
    redis.call('HINCRBY', KEYS[4], 'bytes', #ARGV[i + 1])
  end
end
while tonumber(redis.call('HGET', KEYS[4], 'bytes') or 0) > tonumber(ARGV[2]) do
  local oldest = redis.call('ZPOPMIN', KEYS[3])[1]
  if not oldest then break end
  redis.call('HINCRBY', KEYS[4], 'bytes', 0 - redis.call('HSTRLEN', KEYS[2], oldest))
  redis.call('HINCRBY', KEYS[4], 'evicted', 1)
  redis.call('HDEL', KEYS[2], oldest)
end
return true
"""

COMMIT_ANCHORS = """
local function commit_anchors(pairs_, anchor_of, anchors, ages, counts)
  for i = 1, #pairs_, 2 do
    local before = redis.call('HGET', anchor_of, pairs_[i])
    if before then
      -- 0 - n: Lua's -0, of an anchor that was evicted, is no number to Redis 7.0
      redis.call('HINCRBY', counts, 'bytes', 0 - redis.call('HSTRLEN', anchors, before))
      redis.call('HDEL', anchors, before)
      redis.call('ZREM', ages, before)
      redis.call('HDEL', anchor_of, pairs_[i])
    end
    if redis.call('HEXISTS', anchors, pairs_[i + 1]) == 1 then
      redis.call('HSET', anchor_of, pairs_[i], pairs_[i + 1])
    end
  end
end
"""
"""Part of the value store's script: (prompt, lease)... of leases that it closes with evidence."""


def is_anchored(prompt_id: str, share: float) -> bool:
    """Whether responses of this prompt are kept: the same prompts throughout a run, ``share`` of all, in [0, 1]."""
    return zlib.crc32(prompt_id.encode()) < share * 2**32


async def read_anchors(redis: Redis, keys: Keys, prompt_ids: Sequence[str]) -> list[bytes | None]:
    """The anchor of each prompt as the learner packed it; None where there is none."""
    if not prompt_ids:
        return []
    leases = await redis.hmget(keys.anchor_of, list(prompt_ids))
    found = [lease for lease in leases if lease is not None]
    packed = dict(zip(found, await redis.hmget(keys.anchors, found), strict=True)) if found else {}
    return [packed.get(lease) for lease in leases]
