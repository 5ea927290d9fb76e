"""The space-time map of a run as an SVG: a row per worker, time to the right, idle is empty. For pages and slides.

A column of the picture shows what its worker did most in that time: the height is the share of it that was busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tandem.sim.metrics import Span
from tandem.sim.simulation import Outcome

_COLOURS = {"prefill": "#d97706", "mixed": "#7c3aed", "decode": "#2563eb"}
_WIDTH, _LABEL, _ROW, _BAR, _HEAD, _FOOT = 900, 44, 26, 20, 46, 26
_COLUMN = 2  # pixels


def to_svg(outcome: Outcome, title: str, begin_s: float = 0.0, end_s: float | None = None) -> str:
    """From ``begin_s`` to ``end_s`` (None: the end)."""
    end_s = outcome.end_s if end_s is None else min(end_s, outcome.end_s)
    height = _HEAD + _ROW * len(outcome.workers) + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="4" y="16" font-weight="bold">{escape(title)}</text>',
    ]
    at = 4
    for kind, meaning in (("prefill", "prefill"), ("mixed", "both in one step"), ("decode", "decode")):
        parts.append(f'<rect x="{at}" y="25" width="10" height="10" fill="{_COLOURS[kind]}"/>')
        parts.append(f'<text x="{at + 15}" y="34">{meaning}</text>')
        at += 40 + 7 * len(meaning)
    for index, worker in enumerate(outcome.workers):
        top = _HEAD + _ROW * index
        parts.append(f'<text x="4" y="{top + 15}">{escape(worker.id)}</text>')
        parts.append(f'<rect x="{_LABEL}" y="{top}" width="{_WIDTH - _LABEL}" height="{_BAR}" fill="#f1f3f5"/>')
        parts += _bars(worker.activity.spans, top, begin_s, end_s)
    for tick in range(5):
        x = _LABEL + (_WIDTH - _LABEL - 40) * tick / 4
        at_s = begin_s + (end_s - begin_s) * (x - _LABEL) / (_WIDTH - _LABEL)
        parts.append(f'<text x="{x:.0f}" y="{height - 8}" fill="#6b7280">{at_s:.1f} s</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bars(spans: Sequence[Span], top: int, begin_s: float, end_s: float) -> list[str]:
    columns = (_WIDTH - _LABEL) // _COLUMN
    width_s = (end_s - begin_s) / columns
    busy: list[dict[str, float]] = [{} for _ in range(columns)]
    for span in spans:
        first = max(0, int((span.begin_s - begin_s) / width_s))
        last = min(columns - 1, int((span.end_s - begin_s) / width_s))
        for column in range(first, last + 1):
            left = begin_s + column * width_s
            inside = min(span.end_s, left + width_s) - max(span.begin_s, left)
            if inside > 0.0:
                busy[column][span.kind] = busy[column].get(span.kind, 0.0) + inside
    bars = []
    for column, kinds in enumerate(busy):
        if kinds:
            share = min(1.0, sum(kinds.values()) / width_s)
            colour = _COLOURS[max(kinds, key=lambda kind: kinds[kind])]
            high = max(1, round(share * _BAR))
            bars.append(
                f'<rect x="{_LABEL + column * _COLUMN}" y="{top + _BAR - high}" width="{_COLUMN}" height="{high}" '
                f'fill="{colour}"/>'
            )
    return bars
