"""The state table: every path ends, ends are final, and disorder of the bus is legal where the table says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.lifecycle import TRANSITIONS, Event, State, advance
from tandem.errors import InternalError


def test_every_state_has_a_way_out_or_is_an_end() -> None:
    assert {state for state in State if state.ended} == set(State) - set(TRANSITIONS)
    for state, ways in TRANSITIONS.items():
        assert any(after.ended for after in ways.values()), state


def test_every_state_is_reachable() -> None:
    seen, todo = {State.QUEUED}, [State.QUEUED]
    while todo:
        for after in TRANSITIONS.get(todo.pop(), {}).values():
            if after not in seen:
                seen.add(after)
                todo.append(after)
    assert seen == set(State)


@pytest.mark.parametrize(
    "events",
    [
        [Event.PLACE, Event.PREFILL_DONE, Event.DECODE_STARTED, Event.FINISH],
        [Event.PLACE, Event.DECODE_STARTED, Event.FINISH],
        [Event.PLACE, Event.FINISH],  # both events between were lost
        [Event.PLACE, Event.DECODE_STARTED, Event.PREFILL_DONE, Event.DECODE_STARTED, Event.FINISH],  # late, repeated
    ],
)
def test_ways_through_life(events: list[Event]) -> None:
    state = State.QUEUED
    for event in events:
        assert not state.ended
        state = advance(state, event)
    assert state is State.FINISHED


@given(st.sampled_from(list(State)), st.sampled_from(list(Event)))
def test_what_is_not_in_the_table_raises(state: State, event: Event) -> None:
    if event in TRANSITIONS.get(state, {}):
        assert advance(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(InternalError, match=event.value):
            advance(state, event)


@given(st.lists(st.sampled_from([e for e in Event if e is not Event.PLACE])))
def test_a_placed_request_goes_forward_only(events: list[Event]) -> None:
    order = [State.PREFILLING, State.TRANSFERRING, State.DECODING]
    state = State.PREFILLING
    for event in events:
        if state.ended or event not in TRANSITIONS[state]:
            continue
        after = advance(state, event)
        assert after.ended or order.index(after) >= order.index(state)
        state = after
