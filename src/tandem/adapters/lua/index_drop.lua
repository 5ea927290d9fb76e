-- ARGV: model, owner, slot, cursor, budget -> the next cursor; 65536 = done, or the slot is not ours.
-- Masked from the first step to the last; only its owner takes steps, so nothing is written meanwhile.
local model, slot = ARGV[1], tonumber(ARGV[3])
if redis.call('HGET', slots_key(model), slot) ~= ARGV[2] then return 65536 end
local active = redis.call('GET', active_key(model)) or ''
local cursor = sweep_buckets(model, single(slot), tonumber(ARGV[4]), tonumber(ARGV[5]))
if cursor < 65536 then
  redis.call('SET', active_key(model), without(active, single(slot)))
else
  redis.call('SET', active_key(model), with_bit(active, slot))
end
return cursor
