"""What a decode engine must never be told: vLLM would die of it, or read the wrong blocks."""

import json
from typing import Any

import pytest

from tandem.engine.handoff import CacheGroup, consumer_params, dump_params
from tandem.engine.protocol import KvHandoff
from tandem.errors import HandoffFailed

GOOD: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[7, 3, 9]],
    "remote_engine_id": "e1",
    "remote_request_id": "r1-ab",
    "remote_host": "127.0.0.1",
    "remote_port": 5701,
    "tp_size": 1,
    "dcp_size": 1,
    "pp_size": 1,
    "remote_num_tokens": 70,
    "transfer_mode": "pull",
    "num_blocks": 10,
    "remote_blocks_expiry_time": None,
    "remote_prefill_cached_tokens": 32,
}
FULL = [CacheGroup(32)]


def handoff(change: dict[str, Any] | None = None, num_tokens: int = 70) -> KvHandoff:
    return KvHandoff("r1-ab", "e1", num_tokens, dump_params(GOOD | (change or {})))


def test_a_sound_handoff_passes_with_what_is_known_and_no_more() -> None:
    params = consumer_params(handoff({"surprise": 1}), 70, FULL)
    assert params["remote_block_ids"] == [[7, 3, 9]]
    assert not {"surprise", "num_blocks", "remote_blocks_expiry_time", "remote_prefill_cached_tokens"} & params.keys()


@pytest.mark.parametrize("tokens, blocks", [(1, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_exactly_the_blocks_of_the_prompt(tokens: int, blocks: int) -> None:
    for count in range(5):
        change = {"remote_block_ids": [list(range(1, count + 1))], "remote_num_tokens": tokens}
        if count == blocks:
            consumer_params(handoff(change, tokens), tokens, FULL)
        else:
            with pytest.raises(HandoffFailed):
                consumer_params(handoff(change, tokens), tokens, FULL)


@pytest.mark.parametrize(
    "change",
    [
        {"remote_block_ids": None},
        {"remote_block_ids": [7, 3, 9]},
        {"remote_block_ids": [[7, 3, 9], [1, 2, 4]]},
        {"remote_block_ids": [[7, 3, 3]]},
        {"remote_block_ids": [[7, 3, 10]]},
        {"remote_block_ids": [[0, 3, 9]]},
        {"remote_block_ids": [[7, 3, True]]},
        {"remote_block_ids": [["7", 3, 9]]},
        {"do_remote_prefill": 1},
        {"do_remote_prefill": False},
        {"remote_engine_id": "e2"},
        {"remote_request_id": "another"},
        {"remote_num_tokens": 71},
        {"remote_host": ""},
        {"remote_port": 0},
        {"remote_port": "5701"},
        {"tp_size": 0},
        {"transfer_mode": "push"},
        {"num_blocks": None},
    ],
    ids=str,
)
def test_anything_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(HandoffFailed):
        consumer_params(handoff(change), 70, FULL)


@pytest.mark.parametrize("missing", sorted(GOOD.keys() - {"remote_blocks_expiry_time", "remote_prefill_cached_tokens"}))
def test_nothing_may_be_missing(missing: str) -> None:
    if missing == "do_remote_decode":
        return
    raw = json.dumps({k: v for k, v in GOOD.items() if k != missing}).encode()
    with pytest.raises(HandoffFailed):
        consumer_params(KvHandoff("r1-ab", "e1", 70, raw), 70, FULL)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_nonsense_is_refused(raw: bytes) -> None:
    with pytest.raises(HandoffFailed, match="malformed"):
        consumer_params(KvHandoff("r1-ab", "e1", 70, raw), 70, FULL)


def test_another_prompt_is_refused() -> None:
    with pytest.raises(HandoffFailed, match="70 tokens, the prompt has 71"):
        consumer_params(handoff(), 71, FULL)


def test_a_sliding_window_group_has_at_most_its_window() -> None:
    groups = [CacheGroup(32), CacheGroup(32, sliding_window=32)]
    consumer_params(handoff({"remote_block_ids": [[7, 3, 9], [2, 4]]}), 70, groups)
    with pytest.raises(HandoffFailed):
        consumer_params(handoff({"remote_block_ids": [[7, 3, 9], [2, 4, 5]]}), 70, groups)
