"""Who leads each model, from what the routers announce. Pure: ``now`` is an argument.

The highest epoch heard wins. A leader that has said nothing for ``silence_s`` (announcements come every 250 ms), or
whose subject nobody listens to, leads no longer until it is heard again.
"""

from __future__ import annotations

from dataclasses import dataclass

SILENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Leader:
    router: str
    epoch: int


class Leaders:
    def __init__(self, *, silence_s: float = SILENCE_S) -> None:
        self._silence_s = silence_s
        self._leaders: dict[str, Leader] = {}
        self._heard_s: dict[str, float] = {}
        self._gone: set[str] = set()

    def heard(self, model: str, router: str, epoch: int, now: float) -> bool:
        """True when requests of ``model`` have a new place to go: another leader, or one that was gone."""
        known = self._leaders.get(model)
        if known is not None and epoch < known.epoch:
            return False
        back = self.current(model, now) is None
        self._leaders[model] = leader = Leader(router, epoch)
        self._heard_s[model] = now
        self._gone.discard(model)
        return back or leader != known

    def gone(self, model: str, router: str) -> bool:
        """Nobody listens to ``router`` any more. False when it does not lead ``model`` (any more)."""
        known = self._leaders.get(model)
        if known is None or known.router != router:
            return False
        self._gone.add(model)
        return True

    def bus_is_back(self, now: float) -> None:
        """Nobody could be heard while the bus was away: every silence starts anew."""
        for model in self._heard_s:
            self._heard_s[model] = now

    def not_listened(self, seconds: float, now: float) -> None:
        """To anybody, until now: no silence counts in which nobody could be heard; what came before it does."""
        for model, heard_s in self._heard_s.items():
            self._heard_s[model] = min(now, heard_s + seconds)

    def current(self, model: str, now: float) -> Leader | None:
        if model in self._gone or now - self._heard_s.get(model, -1e9) > self._silence_s:
            return None
        return self._leaders.get(model)

    def silent_s(self, model: str, now: float) -> float:
        """Seconds since the model's leader was last heard; how long ago there was none is the caller's to know."""
        return now - self._heard_s.get(model, now)
