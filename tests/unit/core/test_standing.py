"""A large fleet is looked at from the front: the choice is that of a look at all, and a kept order is a made one."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.perf_model import PerfState
from tandem.core.placement import Standings, decide
from tandem.core.standing import Standing, backlog_s, next_step_s
from tandem.core.types import RequestKey, Role
from tests.unit.core.test_placement import POLICY, busy, inquiry, view


def standings(decoders: list, prefillers: list) -> Standings:  # type: ignore[type-arg]
    made = Standings(Standing(next_step_s), Standing(backlog_s), Standing(backlog_s))
    made.decoders.reset(decoders)
    made.prefillers.reset(prefillers)
    return made


def fleet(rng: random.Random, size: int) -> tuple[list, list]:  # type: ignore[type-arg]
    decoders = [
        busy(view(f"d{i:03}"), streams=rng.randrange(70), kv_each=rng.randrange(200, 8000)) for i in range(size)
    ]
    prefillers = [busy(view(f"p{i:03}", Role.PREFILL), prefill=rng.randrange(1, 20000)) for i in range(size)]
    return decoders, prefillers


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_the_same_choice_as_from_a_look_at_all(seed: int) -> None:
    """Full workers, avoided ones and reserved ones among them."""
    rng = random.Random(seed)
    decoders, prefillers = fleet(rng, rng.randrange(17, 50))
    holders = rng.sample(decoders + prefillers, rng.randrange(25))
    isl = rng.randrange(500, 16000)
    asked = inquiry(
        isl,
        {w.id: rng.randrange(0, isl) // 16 * 16 for w in holders},
        avoid=frozenset(w.id for w in rng.sample(decoders, 3)),
        reserved={w.id: RequestKey("other") for w in rng.sample(decoders, 3)},
    )
    every = decide(asked, decoders, prefillers, POLICY, 0.0)
    front = decide(asked, decoders, prefillers, POLICY, 0.0, standings=standings(decoders, prefillers))
    assert [(c.score, c.plan) for c in front.candidates] == [(c.score, c.plan) for c in every.candidates]
    assert front.partial or sorted(front.excluded) == sorted(every.excluded)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_as_good_a_choice_where_workers_differ_in_speed(seed: int) -> None:
    """Each has learnt its own timing: the order by a typical prompt is not quite the one by this prompt."""
    rng = random.Random(seed)
    decoders, prefillers = fleet(rng, 40)
    for worker in decoders + prefillers:
        slower = rng.uniform(0.7, 1.5)
        worker.perf.adopt(PerfState((slower,) * 4, (slower,) * 3, 0.1, 0.1))
    asked = inquiry(rng.randrange(200, 16000))
    every = decide(asked, decoders, prefillers, POLICY, 0.0).best
    front = decide(asked, decoders, prefillers, POLICY, 0.0, standings=standings(decoders, prefillers)).best
    assert every is not None
    assert front is not None
    assert front.score <= 1.02 * every.score + 0.005


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_an_order_kept_is_an_order_made(seed: int) -> None:
    rng = random.Random(seed)
    workers = [view(f"d{i:02}") for i in range(20)]
    kept = Standing(next_step_s)
    kept.reset(workers)
    for step in range(30):
        for worker in rng.sample(workers, rng.randrange(4)):
            worker.own_sequences = rng.randrange(10)
            worker.own_kv_tokens = 1000 * step
            kept.touch(worker.id)
        made = Standing(next_step_s)
        made.reset(workers)
        assert [w.id for w in kept.ranked()] == [w.id for w in made.ranked()]
    kept.touch("nobody")
    assert len(list(kept.ranked())) == len(kept) == 20
    assert kept.find("nobody") is None
