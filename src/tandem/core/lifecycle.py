"""The life of one request (id, attempt, choice), as its scheduler sees it.

    QUEUED ──place──> PREFILLING ──prefill_done──> TRANSFERRING ──decode_started──> DECODING ──finish──> FINISHED
      │                   │  └───────────decode_started (local leg)───────────────────^
      │                   ├── fail, abort, lose: from every placed state
      │                   └── recall
      └── refuse, abort, fail

QUEUED       waits in the router. The only state in which the scheduler still may change its mind.
PREFILLING   assigned. The first worker computes the prompt; its prefill credit is taken, KV room is reserved on every
             worker of the plan.
TRANSFERRING remote leg only: the prompt is computed, the KV waits on the prefill worker or moves. The prefill credit
             is back; the KV room on both sides is still taken.
DECODING     the decode worker produces tokens. The prefill worker, if there was one, has been told to forget.
FINISHED, FAILED, ABORTED, REFUSED, LOST, RECALLED   the end. Everything reserved has been given back, exactly once.

Retry and migration are no transitions here: the frontend owns the request, and when it submits again that is another
attempt, a new key with a life of its own. What this attempt's end was (FAILED: the worker said so; LOST: the worker
died; ABORTED: the owner said so; RECALLED: it was background work in the way) is what the next one is told by.

Lifecycle events travel best effort: each may be lost, repeated or late. The table therefore says which disorder is
*legal*: an event that tells what is already known leaves the state as it is; an event that implies a lost one takes
its place (``finish`` from PREFILLING; ``decode_started`` without ``prefill_done``). On a local leg the end of the
prefill *is* the start of decoding. Whatever is not in the table is a defect of the caller and raises
``InternalError``. After an end nothing is legal: the scheduler has forgotten the key by then, and unknown keys are
dropped before they get here.
"""

from __future__ import annotations

from enum import Enum

from tandem.errors import InternalError


class State(Enum):
    __hash__ = object.__hash__  # machine code, where Enum's own is Python: several times a request

    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"
    REFUSED = "refused"
    LOST = "lost"
    RECALLED = "recalled"

    @property
    def ended(self) -> bool:
        return self in _ENDS

    @property
    def placed(self) -> bool:
        return self in _PLACED


class Event(Enum):
    __hash__ = object.__hash__  # as above

    PLACE = "place"
    PREFILL_DONE = "prefill_done"
    DECODE_STARTED = "decode_started"
    FINISH = "finish"
    FAIL = "fail"
    ABORT = "abort"
    LOSE = "lose"
    REFUSE = "refuse"
    RECALL = "recall"


_PLACED = frozenset({State.PREFILLING, State.TRANSFERRING, State.DECODING})
_ENDS = frozenset({State.FINISHED, State.FAILED, State.ABORTED, State.REFUSED, State.LOST, State.RECALLED})
_ANY_END = {
    Event.FINISH: State.FINISHED,
    Event.FAIL: State.FAILED,
    Event.ABORT: State.ABORTED,
    Event.LOSE: State.LOST,
}

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.QUEUED: {
        Event.PLACE: State.PREFILLING,
        Event.REFUSE: State.REFUSED,
        Event.ABORT: State.ABORTED,
        Event.FAIL: State.FAILED,
    },
    State.PREFILLING: {
        Event.PREFILL_DONE: State.TRANSFERRING,
        Event.DECODE_STARTED: State.DECODING,
        Event.RECALL: State.RECALLED,
        **_ANY_END,
    },
    State.TRANSFERRING: {
        Event.PREFILL_DONE: State.TRANSFERRING,
        Event.DECODE_STARTED: State.DECODING,
        **_ANY_END,
    },
    State.DECODING: {
        Event.PREFILL_DONE: State.DECODING,
        Event.DECODE_STARTED: State.DECODING,
        **_ANY_END,
    },
}


def advance(state: State, event: Event) -> State:
    """The state after ``event``. InternalError if the table has no such entry."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise InternalError(f"{event.value} is not possible when {state.value}") from None
