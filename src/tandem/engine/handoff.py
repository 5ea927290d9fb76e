"""Checks a KV handoff before an engine sees it. Pure.

vLLM believes every word: too few block ids kill the EngineCore, one too many shifts every block silently. So a handoff
must name, for each full-attention group, exactly the blocks of the prompt, distinct and within the producer's pool;
for a sliding-window group, at most its window; and speak of the very prompt that the request has. What is not known
here is not passed on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.engine.protocol import KvHandoff
from tandem.errors import HandoffFailed


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """One KV cache group of the consumer. ``sliding_window`` in tokens; None = attends to all."""

    block_size: int
    sliding_window: int | None = None

    def expects(self, count: int, num_tokens: int) -> bool:
        blocks = -(-num_tokens // self.block_size)
        if self.sliding_window is None:
            return count == blocks
        return count <= min(blocks, -(-self.sliding_window // self.block_size) + 1)


def dump_params(params: Mapping[str, Any]) -> bytes:
    """What a producer's engine returned, as KvHandoff.params."""
    return json.dumps(dict(params), separators=(",", ":")).encode()


def consumer_params(handoff: KvHandoff, prompt_tokens: int, groups: Sequence[CacheGroup]) -> dict[str, Any]:
    """kv_transfer_params for the consumer's engine. HandoffFailed with the reason when the handoff is not sound."""
    try:
        raw = json.loads(handoff.params)
    except ValueError as e:
        raise HandoffFailed(f"malformed KV handoff: {e}") from e
    if not isinstance(raw, dict):
        raise HandoffFailed("malformed KV handoff: not an object")
    if handoff.num_tokens != prompt_tokens:
        raise HandoffFailed(f"the handoff holds {handoff.num_tokens} tokens, the prompt has {prompt_tokens}")
    fields = _Fields(raw)
    fields.equal("do_remote_prefill", True)
    fields.equal("transfer_mode", "pull")
    fields.equal("remote_engine_id", handoff.engine_id)
    fields.equal("remote_request_id", handoff.handoff_id)
    fields.equal("remote_num_tokens", prompt_tokens)
    num_blocks = fields.integer("num_blocks", 2, 1 << 40)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_mode": "pull",
        "remote_engine_id": handoff.engine_id,
        "remote_request_id": handoff.handoff_id,
        "remote_num_tokens": prompt_tokens,
        "remote_host": fields.text("remote_host"),
        "remote_port": fields.integer("remote_port", 1, 65535),
        "tp_size": fields.integer("tp_size", 1, 4096),
        "dcp_size": fields.integer("dcp_size", 1, 4096),
        "pp_size": fields.integer("pp_size", 1, 4096),
        "remote_block_ids": _block_ids(raw.get("remote_block_ids"), prompt_tokens, num_blocks, groups),
    }


def _block_ids(value: object, prompt_tokens: int, num_blocks: int, groups: Sequence[CacheGroup]) -> list[list[int]]:
    if not isinstance(value, list) or len(value) != len(groups):
        raise HandoffFailed(f"the handoff must name blocks of {len(groups)} KV cache groups")
    for group, ids in zip(groups, value, strict=True):
        if not isinstance(ids, list) or not all(type(i) is int and 0 < i < num_blocks for i in ids):
            raise HandoffFailed(f"the handoff's block ids must be integers from 1 to {num_blocks - 1}")
        if len(set(ids)) != len(ids):
            raise HandoffFailed("the handoff names a block twice")
        if not group.expects(len(ids), prompt_tokens):
            raise HandoffFailed(f"the handoff names {len(ids)} blocks, which does not fit {prompt_tokens} tokens")
    return value


@dataclass(frozen=True, slots=True)
class _Fields:
    raw: dict[str, Any]

    def equal(self, name: str, expected: object) -> None:
        value = self.raw.get(name)
        if value != expected or type(value) is not type(expected):
            raise HandoffFailed(f"the handoff's {name} is {value!r}, expected {expected!r}")

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= 255:
            raise HandoffFailed(f"the handoff's {name} is {value!r}, expected a name")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.raw.get(name)
        if type(value) is not int or not low <= value <= high:
            raise HandoffFailed(f"the handoff's {name} is {value!r}, expected an integer from {low} to {high}")
        return value
