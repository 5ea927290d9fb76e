-- Every key of the store but the counters', declared once. Prepended to each script. KEYS[1] is the cluster's root;
-- names of models and workers come encoded (no colon), and an owner is "<worker> <incarnation>".
local ROOT = KEYS[1] .. ':'
local WORKERS = ROOT .. 'workers'                                                  -- set of workers
local function worker_key(worker) return ROOT .. 'worker:' .. worker end           -- hash, expires
local function lease_key(model) return ROOT .. 'lease:' .. model end               -- hash: holder, epoch; expires
local function epoch_key(model) return ROOT .. 'epoch:' .. model end               -- the last epoch given out
local function slots_key(model) return ROOT .. 'index:' .. model .. ':slots' end   -- hash: slot -> owner
local function dirty_key(model) return ROOT .. 'index:' .. model .. ':dirty' end   -- hash of slots to sweep before reuse
local function active_key(model) return ROOT .. 'index:' .. model .. ':active' end -- bitmap of slots that lookups see
local function sweep_key(model) return ROOT .. 'index:' .. model .. ':sweep' end   -- hash: mask, cursor of the round
local function size_key(model) return ROOT .. 'index:' .. model .. ':size' end     -- number of blocks
local function bucket_prefix(model) return ROOT .. 'index:' .. model .. ':p' end   -- + 2 bytes; field 6 bytes -> bitmap
