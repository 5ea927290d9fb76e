-- ARGV: model, worker, incarnation, ttl_ms, slots, info, wire_version, then name and value of what workers must share.
-- -> {'ok', slot, slots to sweep} | {'incompatible', name, theirs, ours, other worker} | {'full', slots to sweep}
local model, worker, incarnation, ttl_ms, slots, info, wire =
  ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
local owner = worker .. ' ' .. incarnation
local names, ours = {}, {}
for i = 8, #ARGV, 2 do
  names[#names + 1], ours[#ours + 1] = ARGV[i], ARGV[i + 1]
end

-- The living of this model. What they must share, one of them can tell; wire versions may differ by one.
local owners, compared = {}, false
for _, other in ipairs(redis.call('SMEMBERS', WORKERS)) do
  local entry = redis.call('HMGET', worker_key(other), 'model', 'incarnation', 'wire_version')
  if not entry[1] then
    redis.call('SREM', WORKERS, other)
  elseif entry[1] == model and other ~= worker then
    owners[other .. ' ' .. entry[2]] = true
    if not compared then
      compared = true
      local theirs = redis.call('HMGET', worker_key(other), unpack(names))
      for i, name in ipairs(names) do
        if theirs[i] ~= ours[i] then return {'incompatible', name, theirs[i] or '', ours[i], other} end
      end
    end
    if math.abs(tonumber(entry[3]) - wire) > 1 then
      return {'incompatible', 'wire_version', entry[3], ARGV[7], other}
    end
  end
end

-- The entry of an earlier incarnation, or of the same worker when it served another model.
local old = redis.call('HMGET', worker_key(worker), 'model', 'incarnation', 'slot')
if old[1] and (old[1] ~= model or old[2] ~= incarnation) then
  if redis.call('HGET', slots_key(old[1]), old[3]) == worker .. ' ' .. old[2] then retire(old[1], tonumber(old[3])) end
  redis.call('DEL', worker_key(worker))
end

-- Slots whose owners are gone are for the sweep; our own if we still have it.
local slot
local active = redis.call('GET', active_key(model)) or ''
local leased = redis.call('HGETALL', slots_key(model))
local taken = {}
for i = 1, #leased, 2 do
  local number = tonumber(leased[i])
  taken[number] = true
  if leased[i + 1] == owner and has_bit(active, number) and number < slots then
    slot = number
  elseif not owners[leased[i + 1]] then
    retire(model, number)
  end
end
local dirty = redis.call('HKEYS', dirty_key(model))
for _, number in ipairs(dirty) do taken[tonumber(number)] = true end
if not slot then
  slot = 0
  while taken[slot] do slot = slot + 1 end
  if slot >= slots then return {'full', #dirty} end
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
return {'ok', slot, #dirty}
