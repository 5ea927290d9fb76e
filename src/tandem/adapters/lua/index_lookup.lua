-- ARGV: model, sequence hashes (8 bytes each) -> slot, depth, slot, depth, ...
-- What each worker publishes is prefix-closed, so its depth is found by bisection; workers are kept together in one
-- bitmap for as long as their answers agree, which makes it about log2(blocks) reads in the usual case.
local prefix, hashes = bucket_prefix(ARGV[1]), ARGV[2]
local active = redis.call('GET', active_key(ARGV[1]))
local found = {}
if not active or active == '' or hashes == '' then return found end

-- Each entry: the workers in set hold the first lo blocks, and at most hi.
local lo, hi, set, top = {0}, {#hashes / 8}, {{active:byte(1, -1)}}, 1
while top > 0 do
  local low, high, workers = lo[top], hi[top], set[top]
  top = top - 1
  if low == high then
    for i = 1, #workers do
      local byte = workers[i]
      local slot = (i - 1) * 8
      while byte > 0 do
        if byte % 2 == 1 then
          found[#found + 1], found[#found + 2] = slot, low
          byte = byte - 1
        end
        byte, slot = byte / 2, slot + 1
      end
    end
  else
    -- The first block comes first: most workers hold none of a prompt.
    local middle = low == 0 and 1 or math.ceil((low + high) / 2)
    local at = middle * 8
    local holders = redis.call('HGET', prefix .. hashes:sub(at - 7, at - 6), hashes:sub(at - 5, at)) or ''
    local yes, no, any_yes, any_no = {}, {}, 0, 0
    for i = 1, #workers do
      local both = bit.band(workers[i], holders:byte(i) or 0)
      yes[i], no[i] = both, workers[i] - both
      any_yes, any_no = any_yes + both, any_no + no[i]
    end
    if any_no > 0 and middle > 1 then
      top = top + 1
      lo[top], hi[top], set[top] = low, middle - 1, no
    end
    if any_yes > 0 then
      top = top + 1
      lo[top], hi[top], set[top] = middle, high, yes
    end
  end
end
return found
