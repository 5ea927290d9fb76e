"""What a space-time map consists of, and how what engines report becomes it.

A map has rows (one per worker) and, per row, spans: ``(kind, begin, end, level)``. ``kind`` counts in ``KINDS``; begin
and end are in one unit and on one clock for the whole map; ``level`` is the mean number of sequences that decoded.
A row's spans of the first three kinds never overlap: an engine makes one step at a time. KV transfers overlap the rest.
What no span covers was idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

PREFILL, MIXED, DECODE, TRANSFER = range(4)
#: Names of the kinds, for pages and exports. "mixed" = a prompt is computed in steps that also decode.
KINDS = ("prefill", "mixed", "decode", "transfer")


class Span(NamedTuple):
    kind: int
    begin: float
    end: float
    level: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an engine, as a load report tells it."""

    duration: float
    prefill_tokens: int
    decode_sequences: int

    @property
    def kind(self) -> int:
        if self.prefill_tokens:
            return MIXED if self.decode_sequences else PREFILL
        return DECODE


def spans_of_steps(steps: Sequence[Step], end: float, floor: float, most: int) -> list[Span]:
    """Spans of one report's steps, in order, the last of them ending at ``end``.

    Reports tell how long each step took, not when it began: steps are laid end to end, backwards from the end of the
    last one. They never reach back before ``floor``, the end of what the row has already; if they would, all of them
    shrink alike. More than ``most`` runs of a kind are joined to one span for each kind.
    """
    total = sum(step.duration for step in steps)
    room = end - floor
    if total <= 0 or room <= 0:
        return []
    scale = min(1.0, room / total)
    runs = _runs(steps)
    if len(runs) > most:
        runs = _by_kind(runs)
    spans, at = [], end - total * scale
    for run in runs:
        length = run.duration * scale
        spans.append(Span(run.kind, at, at + length, run.sequence_time / run.duration if run.duration else 0.0))
        at += length
    return spans


@dataclass(slots=True)
class _Run:
    kind: int
    duration: float = 0.0
    sequence_time: float = 0.0


def _runs(steps: Sequence[Step]) -> list[_Run]:
    runs: list[_Run] = []
    for step in steps:
        if not runs or runs[-1].kind != step.kind:
            runs.append(_Run(step.kind))
        runs[-1].duration += step.duration
        runs[-1].sequence_time += step.duration * step.decode_sequences
    return runs


def _by_kind(runs: Sequence[_Run]) -> list[_Run]:
    joined: dict[int, _Run] = {}
    for run in runs:
        whole = joined.setdefault(run.kind, _Run(run.kind))
        whole.duration += run.duration
        whole.sequence_time += run.sequence_time
    return list(joined.values())


def asset(name: str) -> str:
    """map.js, the drawing module (an ES module without imports), or map.css, its colours. Pages serve or hold them."""
    return resources.files("tandem.spacetime").joinpath(name).read_text(encoding="utf-8")
