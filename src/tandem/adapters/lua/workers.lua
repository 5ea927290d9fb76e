-- ARGV: model, or '' for all -> slot, info, slot, info, ...
local found = {}
for _, worker in ipairs(redis.call('SMEMBERS', WORKERS)) do
  local entry = redis.call('HMGET', worker_key(worker), 'model', 'slot', 'info')
  if not entry[1] then
    redis.call('SREM', WORKERS, worker)
  elseif ARGV[1] == '' or entry[1] == ARGV[1] then
    found[#found + 1], found[#found + 2] = entry[2], entry[3]
  end
end
return found
