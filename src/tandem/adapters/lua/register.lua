-- ARGV: model, worker, incarnation, ttl_ms, slots, info, wire_version, then name and value of what workers must share.
-- -> {'ok', slot, slots to sweep} | {'incompatible', name, theirs, ours, other worker} | {'full', slots to sweep}
local model, worker, incarnation, ttl_ms, slots, info, wire =
  ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
local owner = worker .. ' ' .. incarnation
local names, ours = {}, {}
for i = 8, #ARGV, 2 do
  names[#names + 1], ours[#ours + 1] = ARGV[i], ARGV[i + 1]
end

for _, other in ipairs(redis.call('SMEMBERS', WORKERS)) do
  local head = redis.call('HMGET', worker_key(other), 'model', 'wire_version')
  if not head[1] then
    redis.call('SREM', WORKERS, other)
  elseif head[1] == model and other ~= worker then
    local theirs = redis.call('HMGET', worker_key(other), unpack(names))
    for i, name in ipairs(names) do
      if theirs[i] ~= ours[i] then return {'incompatible', name, theirs[i] or '', ours[i], other} end
    end
    if math.abs(tonumber(head[2]) - wire) > 1 then
      return {'incompatible', 'wire_version', head[2], ARGV[7], other}
    end
  end
end

-- The entry of an earlier incarnation, or of the same worker when it served another model.
local old = redis.call('HMGET', worker_key(worker), 'model', 'incarnation', 'slot')
if old[1] and (old[1] ~= model or old[2] ~= incarnation) then
  if redis.call('HGET', slots_key(old[1]), old[3]) == worker .. ' ' .. old[2] then retire(old[1], tonumber(old[3])) end
  redis.call('DEL', worker_key(worker))
end

-- Slots whose owners are gone; our own if we still have it.
local slot
local active = redis.call('GET', active_key(model)) or ''
local leased = redis.call('HGETALL', slots_key(model))
for i = 1, #leased, 2 do
  local number = tonumber(leased[i])
  if leased[i + 1] == owner then
    if has_bit(active, number) and number < slots then slot = number else retire(model, number) end
  else
    local its_worker, its_incarnation = leased[i + 1]:match('^(%S+) (%S+)$')
    if redis.call('HGET', worker_key(its_worker), 'incarnation') ~= its_incarnation then retire(model, number) end
  end
end

local dirty = redis.call('HLEN', dirty_key(model))
if not slot then
  for candidate = 0, slots - 1 do
    if redis.call('HEXISTS', slots_key(model), candidate) == 0
        and redis.call('HEXISTS', dirty_key(model), candidate) == 0 then
      slot = candidate
      break
    end
  end
  if not slot then return {'full', dirty} end
end

local fields = {'model', model, 'incarnation', incarnation, 'slot', slot, 'info', info, 'wire_version', wire}
for i, name in ipairs(names) do
  fields[#fields + 1], fields[#fields + 2] = name, ours[i]
end
redis.call('HSET', worker_key(worker), unpack(fields))
redis.call('PEXPIRE', worker_key(worker), ttl_ms)
redis.call('SADD', WORKERS, worker)
redis.call('HSET', slots_key(model), slot, owner)
redis.call('SET', active_key(model), with_bit(redis.call('GET', active_key(model)) or '', slot))
return {'ok', slot, dirty}
