-- ARGV: model, holder, ttl_ms, epoch_at_least -> the new epoch, or '' when another holds the lease.
-- Epochs stay far below 2^53, where Lua's numbers are exact.
local key = lease_key(ARGV[1])
local holder = redis.call('HGET', key, 'holder')
if holder and holder ~= ARGV[2] then return '' end
local last = tonumber(redis.call('GET', epoch_key(ARGV[1])) or '0')
local epoch = string.format('%.0f', math.max(last + 1, tonumber(ARGV[4])))
redis.call('SET', epoch_key(ARGV[1]), epoch)
redis.call('HSET', key, 'holder', ARGV[2], 'epoch', epoch)
redis.call('PEXPIRE', key, ARGV[3])
return epoch
