"""Fits the terms of a timing profile to measured engine steps.

Least squares on the relative error, no term negative, and robust: a step that is far off for its kind (a stolen CPU,
a garbage collection) counts with the weight that Huber's loss leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tandem.core.profiles import Profile
from tandem.core.types import StepTiming

#: Huber's bound, in standard deviations of the bulk; a median absolute deviation times the second makes one.
_BOUND, _MAD_TO_DEVIATION = 1.345, 1.4826
_ROUNDS = 30
#: Sweeps over the terms; they are few, and each sweep costs nothing.
_SWEEPS = 3000
#: Steps of a kind without which its terms mean nothing.
LEAST_STEPS = 8


def fit(name: str, steps: Sequence[StepTiming], source: str) -> Profile:
    """ValueError if there are too few steps of either kind. ``relative_error`` is 0 here: whoever knows which steps
    make one point of a table states it."""
    prefill = [step for step in steps if step.prefill_tokens > 0]
    decode = [step for step in steps if not step.prefill_tokens and step.decode_sequences > 0]
    if min(len(prefill), len(decode)) < LEAST_STEPS:
        raise ValueError(f"{len(prefill)} prefill and {len(decode)} decode steps are too few to fit a profile to")
    p = _terms(
        [
            (1.0, s.prefill_tokens + s.decode_sequences, s.prefill_context_tokens, s.kv_tokens)
            for s in prefill
        ],
        [s.duration_s for s in prefill],
    )  # fmt: skip
    d = _terms([(1.0, s.decode_sequences, s.kv_tokens) for s in decode], [s.duration_s for s in decode])
    # Steps that did not exercise a term leave it at zero; what decodes read beside a prefill costs as it does alone.
    p3 = p[3] if any(s.kv_tokens for s in prefill) else d[2]
    return Profile(name, p[0], p[1], p[2], p3, d[0], d[1], d[2], source=source, relative_error=0.0)


def _terms(rows: Sequence[Sequence[float]], measured: Sequence[float]) -> list[float]:
    """theta >= 0 of the least robust sum of (theta . row / measured - 1)."""
    size = len(rows[0])
    # Each column to a mean of 1, so that no sweep sees numbers of different orders.
    shares = [[x / y for x in row] for row, y in zip(rows, measured, strict=True)]
    scale = [sum(row[j] for row in shares) / len(shares) or 1.0 for j in range(size)]
    scaled = [[x / s for x, s in zip(row, scale, strict=True)] for row in shares]
    weights = [1.0] * len(scaled)
    theta = [0.0] * size
    for _ in range(_ROUNDS):
        theta = _nonnegative(scaled, weights, theta)
        residuals = [sum(t * x for t, x in zip(theta, row, strict=True)) - 1.0 for row in scaled]
        bound = _BOUND * _MAD_TO_DEVIATION * max(median(abs(r) for r in residuals), 1e-6)
        weights = [min(1.0, bound / max(abs(r), 1e-12)) for r in residuals]
    return [t / s for t, s in zip(theta, scale, strict=True)]


def _nonnegative(rows: Sequence[Sequence[float]], weights: Sequence[float], start: Sequence[float]) -> list[float]:
    """Weighted least squares towards 1 by coordinate descent."""
    size = len(start)
    gram = [
        [sum(w * r[i] * r[j] for w, r in zip(weights, rows, strict=True)) for j in range(size)] for i in range(size)
    ]
    aim = [sum(w * r[i] for w, r in zip(weights, rows, strict=True)) for i in range(size)]
    theta = list(start)
    for _ in range(_SWEEPS):
        moved = 0.0
        for i in range(size):
            if gram[i][i] <= 0.0:
                continue
            rest = sum(gram[i][j] * theta[j] for j in range(size) if j != i)
            new = max(0.0, (aim[i] - rest) / gram[i][i])
            moved = max(moved, abs(new - theta[i]))
            theta[i] = new
        if moved < 1e-9:
            break
    return theta
