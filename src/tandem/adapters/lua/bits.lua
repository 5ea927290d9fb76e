-- Bitmaps of slots as byte strings: slot s is bit s % 8 of byte s / 8, trailing zero bytes are cut off.
local function place_of(slot)
  return math.floor(slot / 8) + 1, bit.lshift(1, slot % 8)
end

local function has_bit(value, slot)
  local at, mask = place_of(slot)
  return bit.band(value:byte(at) or 0, mask) ~= 0
end

local function with_bit(value, slot)
  local at, mask = place_of(slot)
  if #value < at then value = value .. string.rep('\0', at - #value) end
  return value:sub(1, at - 1) .. string.char(bit.bor(value:byte(at), mask)) .. value:sub(at + 1)
end

-- value without every bit of mask (a bitmap too).
local function without(value, mask)
  local bytes = {value:byte(1, -1)}
  local last = 0
  for i = 1, #bytes do
    bytes[i] = bit.band(bytes[i], bit.bnot(mask:byte(i) or 0))
    if bytes[i] ~= 0 then last = i end
  end
  return string.char(unpack(bytes, 1, last))
end

local function single(slot) return with_bit('', slot) end

-- Nobody sees the slot any more, and nobody gets it before it is swept.
local function retire(model, slot)
  redis.call('HDEL', slots_key(model), slot)
  redis.call('HSET', dirty_key(model), slot, '')
  redis.call('SET', active_key(model), without(redis.call('GET', active_key(model)) or '', single(slot)))
end

-- Takes the bits of mask out of the buckets from cursor on; stops when budget (buckets and fields) is spent.
-- Returns the next cursor; 65536 = done.
local function sweep_buckets(model, mask, cursor, budget)
  local prefix, gone = bucket_prefix(model), 0
  local places, bits = {}, {} -- the few bytes of the mask that are not zero
  for i = 1, #mask do
    if mask:byte(i) ~= 0 then places[#places + 1], bits[#bits + 1] = i, mask:byte(i) end
  end
  local function touched(value)
    for i = 1, #places do
      if bit.band(value:byte(places[i]) or 0, bits[i]) ~= 0 then return true end
    end
    return false
  end
  while cursor < 65536 and budget > 0 do
    local key = prefix .. string.char(math.floor(cursor / 256), cursor % 256)
    local fields = redis.call('HGETALL', key)
    for i = 1, #fields, 2 do
      if touched(fields[i + 1]) then
        local left = without(fields[i + 1], mask)
        if left == '' then
          redis.call('HDEL', key, fields[i])
          gone = gone + 1
        else
          redis.call('HSET', key, fields[i], left)
        end
      end
    end
    cursor = cursor + 1
    budget = budget - 1 - #fields / 2
  end
  if gone > 0 then redis.call('DECRBY', size_key(model), gone) end
  return cursor
end
