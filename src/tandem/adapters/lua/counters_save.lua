-- KEYS[2]: the counters; ARGV: name, value, ... They replace what was there.
redis.call('DEL', KEYS[2])
for i = 1, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 0
