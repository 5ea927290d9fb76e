-- ARGV: model, sequence hashes (8 bytes each) -> depth, bitmap of the workers that have it, depth, bitmap, ...
-- What each worker publishes is prefix-closed, so its depth is found by bisection; workers are kept together in one
-- bitmap for as long as their answers agree, which makes it about log2(blocks) reads in the usual case. Bitmaps are
-- taken apart into words of 32 bits, since every operation of Lua's counts here.
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
    local yes, no, any_yes, any_no = {}, workers, false, middle > 1
    if value then
      local holders = words_of(value)
      no, any_no = {}, false
      for i = 1, words do
        local both = band(workers[i], holders[i])
        local rest = workers[i] - both
        yes[i], no[i] = both, rest
        if both ~= 0 then any_yes = true end
        if rest ~= 0 then any_no = true end
      end
    end
    if any_no and middle > 1 then
      top = top + 1
      lo[top], hi[top], set[top] = low, middle - 1, no
    end
    if any_yes then
      top = top + 1
      lo[top], hi[top], set[top] = middle, high, yes
    end
  end
end
return found
