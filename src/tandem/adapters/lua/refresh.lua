-- ARGV: model, worker, incarnation, slot, ttl_ms, info -> 1, or 0 when the entry or the slot is not ours any more.
local entry = redis.call('HMGET', worker_key(ARGV[2]), 'incarnation', 'slot')
if entry[1] ~= ARGV[3] or entry[2] ~= ARGV[4]
    or redis.call('HGET', slots_key(ARGV[1]), ARGV[4]) ~= ARGV[2] .. ' ' .. ARGV[3] then
  return 0
end
redis.call('HSET', worker_key(ARGV[2]), 'info', ARGV[6])
redis.call('PEXPIRE', worker_key(ARGV[2]), ARGV[5])
return 1
