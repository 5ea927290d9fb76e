-- ARGV: model, budget -> buckets left in this round plus rounds to come; 0 = nothing to sweep.
-- A round takes the slots that are dirty when it starts. Its state is in the store: any number of processes may step.
local model = ARGV[1]
local round = redis.call('HMGET', sweep_key(model), 'mask', 'cursor')
local mask, cursor = round[1], tonumber(round[2] or '0')
if not mask then
  mask = ''
  for _, slot in ipairs(redis.call('HKEYS', dirty_key(model))) do mask = with_bit(mask, tonumber(slot)) end
  if mask == '' then return 0 end
end
cursor = sweep_buckets(model, mask, cursor, tonumber(ARGV[2]))
if cursor < 65536 then
  redis.call('HSET', sweep_key(model), 'mask', mask, 'cursor', cursor)
  return 65536 - cursor
end
redis.call('DEL', sweep_key(model))
for _, slot in ipairs(redis.call('HKEYS', dirty_key(model))) do
  if has_bit(mask, tonumber(slot)) then redis.call('HDEL', dirty_key(model), slot) end
end
return redis.call('HLEN', dirty_key(model)) * 65536
