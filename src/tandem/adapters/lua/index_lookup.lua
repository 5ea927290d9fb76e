-- ARGV: model, sequence hashes (8 bytes each) -> depth, bitmap of the workers that have it, depth, bitmap, ...; the
-- deepest first. Who has no block at all is not named.
-- What each worker publishes is prefix-closed, so its depth is found by bisection; workers are kept together in one
-- bitmap for as long as their answers agree, which makes it about log2(blocks) reads in the usual case. Mostly a block
-- is held by the very workers that hold one before it, or by nobody, and then nothing is taken apart: every operation
-- of Lua's counts here, and every table. Otherwise bitmaps become words of 32 bits.
local prefix, hashes = bucket_prefix(ARGV[1]), ARGV[2]
local active = redis.call('GET', active_key(ARGV[1])) or ''
local found = {}
if active == '' or hashes == '' then return found end

local band, call, sub, unpack_words = bit.band, redis.call, string.sub, struct.unpack
local words = math.ceil(#active / 4)
local width = 4 * words
local layout = '<' .. string.rep('i4', words)
local function words_of(value)
  if #value < width then value = value .. string.rep('\0', width - #value) end
  return {unpack_words(layout, value)} -- and one more, the position after
end
local function holders_of(block) -- the bitmap, or false
  local at = block * 8
  return call('HGET', prefix .. sub(hashes, at - 7, at - 6), sub(hashes, at - 5, at))
end

-- Leaves in holders those of workers that are there, and in workers the others; whether anybody is in either.
local function part(workers, holders)
  local any_yes, any_no = false, false
  for i = 1, words do
    local worker = workers[i]
    local both = band(worker, holders[i])
    holders[i] = both
    if both ~= 0 then any_yes = true end
    if both ~= worker then
      any_no = true
      workers[i] = worker - both
    else
      workers[i] = 0
    end
  end
  return any_yes, any_no
end

-- The first block comes first: most workers hold none of a prompt, and need not be told from each other.
local value = holders_of(1)
if not value then return found end
local set = words_of(value)
if value ~= active and not part(words_of(active), set) then return found end

-- The workers in set hold the first low blocks, and at most high. All of them are in the bitmap value, and none of them
-- in the bitmap without: a block with either of these needs no other look. On the stack: those that hold less.
local low, high, without = 1, #hashes / 8, false
local lows, highs, sets, values, withouts, top = {}, {}, {}, {}, {}, 0
while true do
  while low < high do
    local middle = math.ceil((low + high) / 2)
    local there = holders_of(middle)
    if there == value then
      low = middle
    elseif not there or there == without then
      high = middle - 1
    else
      local holders = words_of(there)
      local any_yes, any_no = part(set, holders)
      if not any_yes then
        high, without = middle - 1, there
      else
        if any_no then
          top = top + 1
          lows[top], highs[top], sets[top], values[top], withouts[top] = low, middle - 1, set, value, there
        end
        low, set, value = middle, holders, there
      end
    end
  end
  found[#found + 1], found[#found + 2] = low, struct.pack(layout, unpack(set, 1, words))
  if top == 0 then return found end
  low, high, set, value, without = lows[top], highs[top], sets[top], values[top], withouts[top]
  top = top - 1
end
