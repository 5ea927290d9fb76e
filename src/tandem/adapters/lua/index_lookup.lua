-- ARGV: model, sequence hashes (8 bytes each) -> depth, bitmap of the workers that have it, depth, bitmap, ...; the
-- deepest first.
-- What each worker publishes is prefix-closed, so its depth is found by bisection; workers are kept together in one
-- bitmap for as long as their answers agree, which makes it about log2(blocks) reads in the usual case. Bitmaps are
-- taken apart into words of 32 bits, since every operation of Lua's counts here, and tables that grow most of all: each
-- belongs to one entry of the stack and is changed in place.
local prefix, hashes = bucket_prefix(ARGV[1]), ARGV[2]
local active = redis.call('GET', active_key(ARGV[1])) or ''
local found = {}
if active == '' or hashes == '' then return found end

local band, call, unpack_words = bit.band, redis.call, struct.unpack
local words = math.ceil(#active / 4)
local width = 4 * words
local layout = '<' .. string.rep('i4', words)
local padding = string.rep('\0', width)
local function words_of(value)
  if #value < width then value = value .. padding:sub(#value + 1) end
  return {unpack_words(layout, value)} -- and one more, the position after
end

-- Leaves in holders those of workers that are there, and in workers the others; whether anybody is in either.
local function part(workers, holders)
  local any_yes, any_no = false, false
  for i = 1, words do
    local worker, holder = workers[i], holders[i]
    if worker ~= 0 then
      if holder ~= 0 then
        holder = band(worker, holder)
        holders[i] = holder
        if holder ~= 0 then
          any_yes = true
          worker = worker - holder
          workers[i] = worker
        end
      end
      if worker ~= 0 then any_no = true end
    elseif holder ~= 0 then
      holders[i] = 0
    end
  end
  return any_yes, any_no
end

-- Each entry: the workers in set hold the first lo blocks, and at most hi.
local lo, hi, set, top = {0}, {#hashes / 8}, {words_of(active)}, 1
while top > 0 do
  local low, high, workers = lo[top], hi[top], set[top]
  top = top - 1
  if low == high then
    found[#found + 1], found[#found + 2] = low, struct.pack(layout, unpack(workers, 1, words))
  else
    -- The first block comes first: most workers hold none of a prompt.
    local middle = low == 0 and 1 or math.ceil((low + high) / 2)
    local at = middle * 8
    local value = call('HGET', prefix .. hashes:sub(at - 7, at - 6), hashes:sub(at - 5, at))
    local holders, any_yes, any_no = nil, false, true
    if value then
      holders = words_of(value)
      any_yes, any_no = part(workers, holders)
    end
    if any_no and middle > 1 then
      top = top + 1
      lo[top], hi[top], set[top] = low, middle - 1, workers
    end
    if any_yes then
      top = top + 1
      lo[top], hi[top], set[top] = middle, high, holders
    end
  end
end
return found
