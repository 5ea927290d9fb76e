"""Line charts over time as one SVG: panels below each other, a line per series, the legend at its right end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

#: Told apart in print and by most eyes (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 900, 130, 60, 190, 30, 48


@dataclass(frozen=True)
class Panel:
    """``series``: name -> a value for each of the chart's times."""

    title: str
    series: Mapping[str, Sequence[float]]


def svg(title: str, minutes: Sequence[float], panels: Sequence[Panel]) -> str:
    height = TOP + len(panels) * (PANEL + GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, minutes, TOP + 20 + number * (PANEL + GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, minutes: Sequence[float], top: int) -> list[str]:
    highest = _round_up(max((max(values, default=0.0) for values in panel.series.values()), default=1.0))
    last = max(minutes[-1], 1e-9) if minutes else 1.0
    right = WIDTH - RIGHT

    def x(minute: float) -> float:
        return LEFT + (right - LEFT) * minute / last

    def y(value: float) -> float:
        return top + PANEL * (1 - value / highest)

    parts = [f'<text x="{LEFT}" y="{top - 6}" font-weight="bold">{escape(panel.title)}</text>']
    for share in (0.0, 0.5, 1.0):
        at = y(share * highest)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{share * highest:g}</text>')
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        place = x(share * last)
        parts.append(
            f'<text x="{place:.1f}" y="{top + PANEL + 14}" text-anchor="middle" fill="#666">'
            f"{share * last:.3g} min</text>"
        )
    for number, (name, values) in enumerate(panel.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(m):.1f},{y(v):.1f}" for m, v in zip(minutes, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
        legend = top + 10 + number * 14
        parts.append(f'<text x="{right + 12}" y="{legend}" fill="{colour}">{escape(name)}</text>')
    return parts


def _round_up(value: float) -> float:
    """To a number with one digit that is easy to halve."""
    if value <= 0:
        return 1.0
    size = 1.0
    while size * 10 <= value:
        size *= 10
    while size > value:
        size /= 10
    return next(size * step for step in (1, 2, 4, 6, 8, 10) if size * step >= value)
