"""Which requests are traced. Decided once, by the frontend, when a request comes; everybody else follows the flag.

A client's own decision stands (parent-based). Of the rest a share is traced, chosen by trace id as OpenTelemetry's
TraceIdRatioBased does, and so are some more a second whatever the share: at low load everything, at high load few.
A request that was not sampled and then failed or was slow is traced after all, up to ``late_per_s``: when everything
fails, a few of it say why.
"""

from __future__ import annotations

from dataclasses import dataclass

_BITS = 64
_LOW = (1 << _BITS) - 1


class Budget:
    """So many a second, and ``at_once`` (as many, if not given) after a quiet while. Pure: the time is an argument."""

    __slots__ = ("_last_s", "_left", "_most", "per_s")

    def __init__(self, per_s: float, at_once: float = 0.0) -> None:
        self.per_s = per_s
        self._most = self._left = max(1.0, at_once, per_s)
        self._last_s = float("-inf")

    def take(self, now: float) -> bool:
        if self.per_s <= 0:
            return False
        most = self._most
        self._left = min(most, self._left + min(most, (now - self._last_s) * self.per_s))
        self._last_s = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPolicy:
    #: Share of the requests without a decision of the client's.
    ratio: float = 0.01
    #: So many a second are traced in any case, and so many at once: whoever tries something by hand sees all of it.
    per_s: float = 0.0
    at_once: float = 20.0
    #: Whether a client's decision stands.
    parent_based: bool = True
    #: A first token later than this is slow; a request's own target, where it has one, goes before.
    slow_ttft_s: float = 5.0
    #: Traces a second made after the fact, of requests that failed or were slow.
    late_per_s: float = 10.0


class Sampler:
    def __init__(self, policy: SamplingPolicy) -> None:
        self.policy = policy
        self._bound = round(min(1.0, max(0.0, policy.ratio)) * (1 << _BITS))
        self._budget = Budget(policy.per_s, policy.at_once)
        self._late = Budget(policy.late_per_s)

    def samples(self, trace_id: int, parent_sampled: bool | None, now: float) -> bool:
        """``parent_sampled`` None: the client sent no context."""
        if parent_sampled is not None and self.policy.parent_based:
            return parent_sampled
        return (trace_id & _LOW) < self._bound or self._budget.take(now)

    def samples_late(self, now: float) -> bool:
        return self._late.take(now)
