"""The block pool against a brute-force picture of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.enginemodel.block_pool import BlockPool, CacheEvent, Cleared, Removed, Stored, mix_taint


def replay(events: list[CacheEvent], known: set[int] | None = None) -> set[int]:
    """What a listener believes to be cached. Fails where an event contradicts those before it."""
    cached = set() if known is None else known
    for event in events:
        match event:
            case Stored(hashes, parent):
                assert parent is None or parent in cached
                assert not cached & set(hashes)
                cached |= set(hashes)
            case Removed(hashes):
                assert set(hashes) <= cached
                cached -= set(hashes)
            case Cleared():
                cached.clear()
    return cached


def test_lru_goes_first_and_the_tail_before_the_head() -> None:
    pool = BlockPool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    for i, block in enumerate(old + new):
        pool.cache(block, 10 + i, 10 + i)
    pool.release(old)
    pool.release(new)
    assert pool.num_free == 4 and pool.match([10, 11], 9) == old
    pool.take(pool.match([10], 9))
    pool.release(old[:1])  # used again: now the youngest
    assert pool.allocate(1) == [old[1]]
    assert pool.take_events() == [Removed((11,))]
    pool.allocate(2)
    assert pool.cached_hashes() == {10}


def test_a_duplicate_adopts_the_cached_block() -> None:
    pool = BlockPool(3)
    (first,), (second,) = pool.allocate(1), pool.allocate(1)
    assert pool.cache(first, 5, 5) == first
    assert pool.cache(second, 5, 5) == first
    assert pool.num_used == 1
    pool.release([first])
    pool.release([first])
    assert pool.num_used == 0
    with pytest.raises(ValueError):
        pool.release([first])


def test_more_than_there_is_cannot_be_had() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError):
        pool.allocate(3)
    assert pool.num_free == 2


def test_taint_stays_with_the_block_until_it_is_reused() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.cache(blocks[0], 1, 1)
    pool.cache(blocks[1], 2, 99)
    assert pool.taint(blocks[:1]) == 0
    assert pool.taint(blocks) == mix_taint(0, 99, 2) != 0
    pool.release(blocks)
    pool.allocate(2)
    assert pool.taint(blocks) == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(1, 5)), max_size=60))
def test_random_sequences_come_and_go(program: list[tuple[int, int, int]]) -> None:
    """Chains of equal prefixes are taken, filled, cached and released at random; the books must balance."""
    pool = BlockPool(12)
    held: list[list[int]] = []
    known: set[int] = set()
    for family, victim, length in program:
        chain = [family * 100 + i for i in range(length)]
        hits = pool.match(chain, length)
        brute = 0
        while brute < length and chain[brute] in known:
            brute += 1
        assert len(hits) == brute
        if length - len(hits) <= pool.num_free - pool.num_idle(hits):
            pool.take(hits)
            blocks = hits + pool.allocate(length - len(hits))
            known = replay(pool.take_events(), known)
            for i in range(len(hits), length):
                blocks[i] = pool.cache(blocks[i], chain[i], chain[i])
            known |= set(chain)
            held.append(blocks)
        elif held:
            pool.release(held.pop(victim % len(held)))
        assert known == pool.cached_hashes()
        assert pool.num_used == len({block for blocks in held for block in blocks})
        for block in range(pool.num_blocks):
            assert pool.refs(block) == sum(block in blocks for blocks in held)
