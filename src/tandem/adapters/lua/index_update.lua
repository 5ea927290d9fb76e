-- ARGV: model, owner, slot, hashes to remove, hashes to add (8 bytes each) -> 1, or 0 when the slot is not ours.
local model, owner, slot = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('HGET', slots_key(model), slot) ~= owner
    or not has_bit(redis.call('GET', active_key(model)) or '', slot) then
  return 0
end
local prefix, mine, change = bucket_prefix(model), single(slot), 0
local removed, added = ARGV[4], ARGV[5]
for at = 1, #removed, 8 do
  local key, field = prefix .. removed:sub(at, at + 1), removed:sub(at + 2, at + 7)
  local holders = redis.call('HGET', key, field)
  if holders == mine then
    redis.call('HDEL', key, field)
    change = change - 1
  elseif holders and has_bit(holders, slot) then
    redis.call('HSET', key, field, without(holders, mine))
  end
end
for at = 1, #added, 8 do
  local key, field = prefix .. added:sub(at, at + 1), added:sub(at + 2, at + 7)
  local holders = redis.call('HGET', key, field)
  if not holders then
    redis.call('HSET', key, field, mine)
    change = change + 1
  elseif not has_bit(holders, slot) then
    redis.call('HSET', key, field, with_bit(holders, slot))
  end
end
if change ~= 0 then redis.call('INCRBY', size_key(model), change) end
return 1
