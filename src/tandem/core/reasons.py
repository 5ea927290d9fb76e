"""Why a plan was chosen, in one word: what counters can hold. The full explanation is the decision's own."""

from __future__ import annotations

from enum import Enum

from tandem.core.effects import Place


class Reason(Enum):
    __hash__ = object.__hash__  # machine code, where Enum's own is Python

    ONLY = "only"  # no other plan passed the hard filters
    PACE = "pace"  # another would have been sooner at its first token, but slower or fuller from there on
    PREFIX = "prefix"  # the soonest first token, on a worker that holds a part of the prompt
    LOAD = "load"  # the soonest first token, and nothing of the prompt is cached there


def reason_of(effect: Place) -> Reason:
    candidates = effect.decision.candidates
    if len(candidates) < 2:
        return Reason.ONLY
    chosen_s = effect.candidate.ttft_s
    for candidate in candidates:
        if candidate.ttft_s < chosen_s:
            return Reason.PACE
    return Reason.PREFIX if effect.cached_tokens else Reason.LOAD
