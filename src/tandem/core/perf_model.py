"""How long a worker's engine steps take: predicted from a linear roofline, learnt online from its own timings.

    t_prefill_step = p0 + p1*(n + B) + p2*sum(context) + p3*K      a step that computes n prompt tokens beside B decodes
    t_decode_step  = d0 + d1*B + d2*K                              a step of decodes only

n new prompt tokens, ``context`` the tokens before each of them, B sequences in the batch, K KV tokens that the decodes
read. Seconds and tokens. Coefficients start from a named profile, and each has a multiplier that is learnt: its
logarithm is a state of an extended Kalman filter (recursive least squares that forgets), which measures logarithms of
step times. So a step that is half as long as predicted counts like one that is twice as long, a 5 ms GPU step like a
5 s CPU step, no term turns negative, and a term moves by its share of the prediction: one that the traffic does not
exercise stays near the profile, or moves with the others when all of a worker is slower. Multipliers stay within
[1/20, 100]: a smaller one would have no share by which to come back. A timing that neither the model's own doubt nor
the usual noise explains counts for less, the less likely it is: a stolen CPU second is an outlier, the first steps of a
worker whose profile is wrong are not.

Predictions are *not* inflated here; the caller multiplies by ``Policy.inflation``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tandem.core.profiles import Profile
from tandem.core.types import StepTiming

#: Multipliers of the profile's terms stay within these.
LEAST, MOST = 1.0 / 20.0, 100.0
#: Weight that a timing keeps after one more has come.
_FORGET = 0.995
_FORGET_SQRT = _FORGET**0.5
#: Prior variance of each multiplier's logarithm: a profile's term may well be wrong by a factor of e.
_PRIOR_VARIANCE = 1.0
#: Below it a variance shows that something has been learnt, which may be forgotten again.
_MOST_LEARNT = _PRIOR_VARIANCE * _FORGET
#: Noise of a timing (standard deviation of its logarithm): at first, what may be added by a wrong model at most, and
#: variance below which nobody believes it.
_FIRST_NOISE, _MOST_NOISE, _LEAST_VARIANCE = 0.1, 0.3, 0.01
#: Residuals of more than so many standard deviations are outliers.
_OUTLIER = 3.0
#: One timing changes a multiplier by a factor of e at most.
_LONGEST_STEP = 1.0
_ERROR_MEMORY = 0.03
#: No engine step is shorter; what says so is a broken clock.
_SHORTEST_S = 1e-6
#: Share of what a timing leaves unexplained that moves all terms alike, and the most that counts of it.
_SHARED_RATE, _MOST_SHARED = 0.03, 0.25


#: Terms of a model. One that has fewer leaves the rest without contributions: those then move nothing.
_Terms = tuple[float, float, float, float]


class _Filter:
    """log y = log sum_i theta_i * x_i, for the logarithms of theta, which start at 0.

    Written out for four terms: a router learns from every worker many times a second. ``_cov`` is the upper triangle of
    the covariance, row by row.
    """

    __slots__ = ("_cov", "_noise", "count", "error", "theta")

    def __init__(self, error: float) -> None:
        self.theta: _Terms = (1.0, 1.0, 1.0, 1.0)
        v = _PRIOR_VARIANCE
        self._cov = (v, 0.0, 0.0, 0.0, v, 0.0, 0.0, v, 0.0, v)
        self._noise = _FIRST_NOISE
        self.error = error
        self.count = 0

    def update(self, contributions: _Terms, measured: float) -> None:
        """``contributions``: each profile term's seconds before correction; ``measured``: seconds, positive."""
        c0, c1, c2, c3 = contributions
        t0, t1, t2, t3 = self.theta
        predicted = t0 * c0 + t1 * c1 + t2 * c2 + t3 * c3
        if predicted <= 0.0:
            return
        # How the prediction's logarithm moves with each multiplier's: by the share that its term has.
        x0, x1, x2, x3 = t0 * c0 / predicted, t1 * c1 / predicted, t2 * c2 / predicted, t3 * c3 / predicted
        v00, v01, v02, v03, v11, v12, v13, v22, v23, v33 = self._cov
        g0 = v00 * x0 + v01 * x1 + v02 * x2 + v03 * x3
        g1 = v01 * x0 + v11 * x1 + v12 * x2 + v13 * x3
        g2 = v02 * x0 + v12 * x1 + v22 * x2 + v23 * x3
        g3 = v03 * x0 + v13 * x1 + v23 * x2 + v33 * x3
        doubt = x0 * g0 + x1 * g1 + x2 * g2 + x3 * g3
        noise = _LEAST_VARIANCE + self._noise * self._noise
        residual = math.log(measured / predicted)
        unlikely = residual * residual / (_OUTLIER * _OUTLIER * (noise + doubt))
        if unlikely > 1.0:
            noise *= unlikely
        variance = noise + doubt
        step = residual / variance
        t0, t1, t2, t3 = (
            t0 * _factor(g0 * step),
            t1 * _factor(g1 * step),
            t2 * _factor(g2 * step),
            t3 * _factor(g3 * step),
        )
        t0, t1, t2, t3 = _bounded((t0, t1, t2, t3))
        # What that left over, all terms share: a whole worker is slower, or faster, sooner than one of its terms is.
        # This follows a drift after the covariance has become small.
        left_over = math.log(measured / (t0 * c0 + t1 * c1 + t2 * c2 + t3 * c3))
        shared = math.exp(_SHARED_RATE * max(-_MOST_SHARED, min(_MOST_SHARED, left_over)))
        self.theta = _bounded((t0 * shared, t1 * shared, t2 * shared, t3 * shared))
        self._gain_certainty(g0, g1, g2, g3, variance)
        self._noise += _ERROR_MEMORY * (min(abs(left_over), _MOST_NOISE) - self._noise)
        self.error += _ERROR_MEMORY * (min(abs(measured - predicted) / predicted, 1.0) - self.error)
        self.count += 1

    def _gain_certainty(self, g0: float, g1: float, g2: float, g3: float, variance: float) -> None:
        """Forgets only what has been learnt: a direction without news never becomes less certain than the prior."""
        v00, v01, v02, v03, v11, v12, v13, v22, v23, v33 = self._cov
        v00 -= g0 * g0 / variance
        v11 -= g1 * g1 / variance
        v22 -= g2 * g2 / variance
        v33 -= g3 * g3 / variance
        k0 = _FORGET_SQRT if v00 < _MOST_LEARNT else 1.0
        k1 = _FORGET_SQRT if v11 < _MOST_LEARNT else 1.0
        k2 = _FORGET_SQRT if v22 < _MOST_LEARNT else 1.0
        k3 = _FORGET_SQRT if v33 < _MOST_LEARNT else 1.0
        self._cov = (
            v00 / k0 / k0, (v01 - g0 * g1 / variance) / k0 / k1, (v02 - g0 * g2 / variance) / k0 / k2,
            (v03 - g0 * g3 / variance) / k0 / k3, v11 / k1 / k1, (v12 - g1 * g2 / variance) / k1 / k2,
            (v13 - g1 * g3 / variance) / k1 / k3, v22 / k2 / k2, (v23 - g2 * g3 / variance) / k2 / k3,
            v33 / k3 / k3,
        )  # fmt: skip


def _factor(step: float) -> float:
    return math.exp(max(-_LONGEST_STEP, min(_LONGEST_STEP, step)))


def _bounded(theta: _Terms) -> _Terms:
    """Within the limits of a multiplier."""
    a, b, c, d = theta
    if LEAST <= a <= MOST and LEAST <= b <= MOST and LEAST <= c <= MOST and LEAST <= d <= MOST:
        return theta
    a, b, c, d = (max(LEAST, min(MOST, t)) for t in theta)
    return a, b, c, d


@dataclass(frozen=True, slots=True)
class PerfState:
    """What has been learnt, for a copy to a sibling or to a store."""

    prefill: tuple[float, float, float, float]
    decode: tuple[float, float, float]
    prefill_error: float
    decode_error: float


class PerfModel:
    """One worker's timing model. Coefficients are plain attributes: placement reads them in its inner loop."""

    __slots__ = ("_decode", "_prefill", "d0", "d1", "d2", "p0", "p1", "p2", "p3", "profile")

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._prefill = _Filter(profile.relative_error)
        self._decode = _Filter(profile.relative_error)
        self._apply()

    def _apply(self) -> None:
        prior, p, d = self.profile, self._prefill.theta, self._decode.theta
        self.p0, self.p1, self.p2, self.p3 = prior.p0 * p[0], prior.p1 * p[1], prior.p2 * p[2], prior.p3 * p[3]
        self.d0, self.d1, self.d2 = prior.d0 * d[0], prior.d1 * d[1], prior.d2 * d[2]

    @property
    def relative_error(self) -> float:
        """Mean relative error of recent predictions, the worse of the two phases; at first the profile's own."""
        return max(self._prefill.error, self._decode.error)

    @property
    def prefill_error(self) -> float:
        return self._prefill.error

    @property
    def decode_error(self) -> float:
        return self._decode.error

    @property
    def observations(self) -> int:
        return self._prefill.count + self._decode.count

    def prefill_s(
        self, tokens: float, context: float, chunk: int, sequences: float = 0.0, kv_tokens: float = 0.0
    ) -> float:
        """Seconds to compute ``tokens`` prompt tokens whose contexts sum to ``context``, ``chunk`` tokens a step,
        beside ``sequences`` decodes that read ``kv_tokens``."""
        if tokens <= 0:
            return 0.0
        steps = -(-tokens // chunk)
        return self.p1 * tokens + self.p2 * context + steps * (self.p0 + self.p1 * sequences + self.p3 * kv_tokens)

    def decode_step_s(self, sequences: float, kv_tokens: float) -> float:
        """Seconds of one step that decodes ``sequences`` sequences with ``kv_tokens`` KV tokens in all."""
        return self.d0 + self.d1 * sequences + self.d2 * kv_tokens

    def observe(self, steps: Iterable[StepTiming]) -> None:
        """Learns from what the worker's own clock measured. Steps without work or a plausible duration are skipped."""
        prior = self.profile
        for step in steps:
            if step.duration_s < _SHORTEST_S:
                continue
            if step.prefill_tokens > 0:
                tokens = step.prefill_tokens + step.decode_sequences
                terms = (prior.p0, prior.p1 * tokens, prior.p2 * step.prefill_context_tokens, prior.p3 * step.kv_tokens)
                self._prefill.update(terms, step.duration_s)
            elif step.decode_sequences > 0:
                terms = (prior.d0, prior.d1 * step.decode_sequences, prior.d2 * step.kv_tokens, 0.0)
                self._decode.update(terms, step.duration_s)
        self._apply()

    def state(self) -> PerfState:
        return PerfState(self._prefill.theta, self._decode.theta[:3], self._prefill.error, self._decode.error)

    def adopt(self, state: PerfState) -> None:
        """Starts from what a sibling with the same profile has learnt."""
        self._prefill.theta = state.prefill
        self._decode.theta = (*state.decode, 1.0)
        self._prefill.error = state.prefill_error
        self._decode.error = state.decode_error
        self._apply()
