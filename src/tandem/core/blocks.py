"""Identity of KV blocks for routing: XXH3-64 over token ids, chained, salted.

The scheme of Dynamo and of Mooncake's indexer RFC (seed 1337, little-endian u32 tokens): a block hash covers one
block's tokens, a *sequence hash* chains it to all blocks before. The chain starts from a root that depends on model,
LoRA and the tenant's cache salt, so that equal prompts of two tenants have nothing in common here. It only routes;
what authorises reuse of KV bytes is the engine's own hash.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import xxhash

SEED = 1337
_PAIR = struct.Struct("<QQ")


def root_hash(model: str, lora: str = "", cache_salt: str = "") -> int:
    """Start of the chain for one (model, LoRA, salt)."""
    return int(xxhash.xxh3_64_intdigest("\0".join((model, lora, cache_salt)).encode(), SEED))


def block_hash(tokens: bytes) -> int:
    """Hash of one block's tokens, given as little-endian u32 bytes."""
    return int(xxhash.xxh3_64_intdigest(tokens, SEED))


def chain(parent: int, local: int) -> int:
    """Sequence hash of a block from its parent's sequence hash (or the root) and its own block hash."""
    return int(xxhash.xxh3_64_intdigest(_PAIR.pack(parent, local), SEED))


def sequence_hashes(prompt: bytes, block_size: int, root: int) -> array[int]:
    """Sequence hashes of the full blocks of ``prompt`` (little-endian u32 tokens) as an array of u64."""
    width = 4 * block_size
    digest = xxhash.xxh3_64_intdigest
    pack = _PAIR.pack
    out = array("Q")
    parent = root
    for start in range(0, len(prompt) - width + 1, width):
        parent = digest(pack(parent, digest(prompt[start : start + width], SEED)), SEED)
        out.append(parent)
    return out


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32 bytes: how prompts travel."""
    return array("I", tokens).tobytes()


def token_ids(data: bytes) -> array[int]:
    """Inverse of ``token_bytes``. ValueError if the length is no multiple of 4."""
    out = array("I")
    out.frombytes(data)
    return out
