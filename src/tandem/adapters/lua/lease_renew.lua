-- ARGV: model, holder, epoch, ttl_ms (0 = give it up) -> 1, or 0 when it is not ours.
local key = lease_key(ARGV[1])
local lease = redis.call('HMGET', key, 'holder', 'epoch')
if lease[1] ~= ARGV[2] or lease[2] ~= ARGV[3] then return 0 end
if ARGV[4] == '0' then redis.call('DEL', key) else redis.call('PEXPIRE', key, ARGV[4]) end
return 1
