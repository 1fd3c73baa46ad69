"""The value store's scripts (`ledger`): each compares the fence first; false means that another store holds it."""

from singlestream.streams.anchors import COMMIT_ANCHORS

TAKE_OVER = """
-- KEYS: fence   ARGV: new token, then the tokens that it may replace (none: any)
local holder = redis.call('GET', KEYS[1])
if holder and #ARGV > 1 then
  local ours = false
  for i = 2, #ARGV do ours = ours or holder == ARGV[i] end
  if not ours then return false end
end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""

ISSUE = """
-- KEYS: fence, leases, live, outstanding, ledger   ARGV: token, ledger field, (lease, payload, record)...
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
for i = 3, #ARGV, 3 do
  local entry = redis.call('XADD', KEYS[2], '*', 'id', ARGV[i], 'm', ARGV[i + 1])
  redis.call('HSET', KEYS[3], ARGV[i], entry)
  redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 2])
end
redis.call('HINCRBY', KEYS[5], ARGV[2], (#ARGV - 2) / 3)
return 1
"""

COMMIT = (
    COMMIT_ANCHORS
    + """
-- KEYS: fence, cursors, ledger, dead_letters, anchor_of, anchors, anchor_ages, anchor_counts
-- ARGV: token, msgpack of the change   returns 1, or what differs from the store's memory
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local change = cmsgpack.unpack(ARGV[2])
local function chunks(list, call)  -- Lua's stack bounds the arguments of one command
  for i = 1, #list, 2000 do call(unpack(list, i, math.min(i + 1999, #list))) end
end
if change.stream and (redis.call('HGET', KEYS[2], change.stream) or '0-0') ~= change.before then
  return 'the cursor of ' .. change.stream
end
for key, leases in pairs(change.closes) do
  local differs = nil
  chunks(leases, function(...)
    local found = redis.call('HMGET', key, ...)
    for i = 1, #found do if not found[i] then differs = key end end
  end)
  if differs then return differs end
end
for key, leases in pairs(change.closes) do
  chunks(leases, function(...) redis.call('HDEL', key, ...) end)
end
for key, pairs_ in pairs(change.hashes) do
  chunks(pairs_, function(...) redis.call('HSET', key, ...) end)
end
chunks(change.dropped_jobs, function(...) redis.call('HDEL', change.jobs, ...) end)
for _, job in ipairs(change.dropped_jobs) do redis.call('UNLINK', change.job_results .. job) end
for i = 1, #change.history, 2 do
  if redis.call('LPUSH', change.history[i], change.history[i + 1]) > change.history_entries then
    redis.call('LTRIM', change.history[i], 0, change.history_entries - 1)
  end
end
for name, count in pairs(change.counts) do redis.call('HINCRBY', KEYS[3], name, count) end
for key, text in pairs(change.strings) do redis.call('SET', key, text) end
commit_anchors(change.anchors, KEYS[5], KEYS[6], KEYS[7], KEYS[8])
for _, letter in ipairs(change.dead_letters) do
  redis.call('XADD', KEYS[4], '*', 'source', letter[1], 'id', letter[2], 'reason', letter[3], 'm', letter[4])
end
if change.stream then
  redis.call('HSET', KEYS[2], change.stream, change.after)
  redis.call('XTRIM', change.stream, 'MINID', change.after)
end
return 1
"""
)

CANCEL = """
-- KEYS: fence, leases, live, outstanding, target, ledger   ARGV: token, group, ledger field, (lease, entry,
-- tombstone)...
-- returns the leases cancelled: those whose entry no replica has been given
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local read = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
  local about = {}
  for i = 1, #group, 2 do about[group[i]] = group[i + 1] end
  if about['name'] == ARGV[2] then read = about['last-delivered-id'] end
end
local unread = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '(' .. read, '+')) do unread[entry[1]] = true end
local cancelled = {}
for i = 4, #ARGV, 3 do
  local lease, entry = ARGV[i], ARGV[i + 1]
  if unread[entry] and redis.call('HGET', KEYS[3], lease) == entry and redis.call('HDEL', KEYS[4], lease) == 1 then
    redis.call('HDEL', KEYS[3], lease)
    redis.call('XDEL', KEYS[2], entry)
    redis.call('XADD', KEYS[5], '*', 'id', lease, 'm', ARGV[i + 2])
    cancelled[#cancelled + 1] = lease
  end
end
if #cancelled > 0 then redis.call('HINCRBY', KEYS[6], ARGV[3], #cancelled) end
return cancelled
"""

END_TRAINING = """
-- KEYS: fence, outstanding, live, trajectories, state   ARGV: token, payload, state before, state after
-- returns 1 when the marker stands behind every lease's end, 0 while a lease is still with a replica
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
if redis.call('GET', KEYS[5]) ~= ARGV[3] then return 0 end
for _, lease in ipairs(redis.call('HKEYS', KEYS[2])) do
  if redis.call('HEXISTS', KEYS[3], lease) == 1 then return 0 end
end
redis.call('XADD', KEYS[4], '*', 'id', '', 'm', ARGV[2])
redis.call('SET', KEYS[5], ARGV[4])
return 1
"""

TIDY = """
-- KEYS: fence, ledger, dead_letters, leases...   ARGV: token, dead letters kept, group, idle ms
-- returns the numbers of dead letters and of consumers dropped; a consumer with pending entries stays, they go with it
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local letters = redis.call('XTRIM', KEYS[3], 'MAXLEN', ARGV[2])  -- by length: nothing follows this stream by a cursor
if letters > 0 then redis.call('HINCRBY', KEYS[2], 'dead_letters_dropped', letters) end
local consumers = 0
for i = 4, #KEYS do
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[i], ARGV[3])) do
    local about = {}
    for j = 1, #consumer, 2 do about[consumer[j]] = consumer[j + 1] end
    if about['pending'] == 0 and about['idle'] > tonumber(ARGV[4]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[i], ARGV[3], about['name'])
      consumers = consumers + 1
    end
  end
end
return {letters, consumers}
"""
