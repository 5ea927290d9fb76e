"""What the index says, unspelt, reads like the dict that it stands for, and gives the same answers."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.effects import Place
from tandem.core.holders import Depths, Holders, Slots, apart, cached_by_worker, deepest, front
from tandem.core.policy import Policy, RequestClass
from tandem.core.scheduler import Scheduler
from tandem.core.types import Role
from tests.unit.core.virtual_fleet import request, spec

BLOCK = 16
#: slot -> depth of up to 200 workers, of which the router knows two thirds.
DEPTHS = st.dictionaries(st.integers(0, 1500), st.integers(1, 6), max_size=200)


def known(slots: Mapping[int, int]) -> Slots:
    return Slots([(f"w{slot:04}", slot) for slot in slots if slot % 3], BLOCK)


@given(DEPTHS)
def test_depths_by_slot(depths: dict[int, int]) -> None:
    lazy = Depths.of(depths)
    assert lazy == depths
    assert len(lazy) == len(depths)
    assert list(lazy.values()) == sorted(depths.values(), reverse=True)
    with pytest.raises(KeyError):
        lazy[1501]


@given(DEPTHS)
def test_holders_read_like_the_dict_of_all(depths: dict[int, int]) -> None:
    slots = known(depths)
    cached = cached_by_worker(Depths.of(depths), slots)
    spelt = {f"w{slot:04}": BLOCK * depth for slot, depth in depths.items() if slot % 3}
    assert dict(cached) == spelt
    assert isinstance(cached, Holders) == (len(spelt) > 64)
    assert [cached.get(worker, 0) for worker in (*spelt, "w0000", "nobody")] == [*spelt.values(), 0, 0]
    assert "nobody" not in cached


@given(DEPTHS, st.integers(0, 250), st.integers(1, 40))
def test_the_answers_are_those_of_a_dict(depths: dict[int, int], fleet: int, count: int) -> None:
    """A recording has dicts, and is decided again as it was."""
    slots = known(depths)
    levels = [(BLOCK * depth, bitmap & slots.known) for depth, bitmap in Depths.of(depths).levels]
    lazy = Holders([level for level in levels if level[1]], slots)
    spelt = dict(lazy.items())
    assert deepest(lazy) == deepest(spelt)
    assert front(lazy, count) == front(spelt, count)
    assert apart(lazy, fleet) == apart(spelt, fleet)
    assert list(apart(lazy, fleet)[0]) == list(apart(spelt, fleet)[0])
    if spelt:
        assert spelt[str(deepest(lazy))] == max(spelt.values()) == lazy[str(deepest(lazy))]


@given(DEPTHS.filter(len))
def test_what_all_hold_is_one_number(depths: dict[int, int]) -> None:
    cached = {f"w{slot}": depth for slot, depth in depths.items()}
    more, common = apart(cached, len(cached))
    assert common == min(cached.values())
    assert {worker: more.get(worker, common) for worker in cached} == cached
    assert common not in more.values()
    assert apart(cached, len(cached) + 1) == (cached, 0)


def test_nobody_holds_anything() -> None:
    slots = known({})
    cached = cached_by_worker(Depths([]), slots)
    for nothing in (cached, Holders([], slots)):
        assert deepest(nothing) is None
        assert apart(nothing, 0) == ({}, 0)
        assert not front(nothing, 8)


def test_a_worker_that_joins_while_requests_wait_holds_nothing_of_them() -> None:
    """Whatever all of the fleet held when they came."""
    scheduler = Scheduler(Policy(), classes={"chat": RequestClass(name="chat")}, tenants={}, rng=random.Random(0))
    scheduler.worker_up(spec("a", Role.DECODE), 0.0)
    for number in range(40):
        scheduler.submit(request(f"r{number}", isl=20_000, at=0.0), {"a": 19_900}, 0.0)
    assert all(effect.cached_tokens == 19_900 for effect in scheduler.poll(0.0) if isinstance(effect, Place))
    assert scheduler.num_queued
    scheduler.worker_up(spec("b", Role.DECODE), 0.5)
    placed = [effect for effect in scheduler.poll(0.5) if isinstance(effect, Place)]
    assert placed
    for effect in placed:
        assert effect.cached_tokens == (0 if effect.plan.decode_worker == "b" else 19_900)
