"""Figures for people, in sentences. Pure."""

from __future__ import annotations


def milliseconds(value: float) -> str:
    """41 ms, 1.31 s."""
    if value >= 1000:
        return f"{value / 1e3:,.2f} s"
    return f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def size(number: float) -> str:
    """Of bytes: 180 MB."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
