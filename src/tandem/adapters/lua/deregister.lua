-- ARGV: model, worker, incarnation, slot
if redis.call('HGET', worker_key(ARGV[2]), 'incarnation') == ARGV[3] then
  redis.call('DEL', worker_key(ARGV[2]))
  redis.call('SREM', WORKERS, ARGV[2])
end
if redis.call('HGET', slots_key(ARGV[1]), ARGV[4]) == ARGV[2] .. ' ' .. ARGV[3] then
  retire(ARGV[1], tonumber(ARGV[4]))
end
return 0
