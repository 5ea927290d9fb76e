"""Which waiting request comes next: class, then fair share among tenants in tokens, then deadline.

*Class*: lowest rank first, but a class that waits and has had less than its guaranteed share of the tokens served
lately goes before all that have had theirs. *Tenant*: the lowest virtual counter, which counts served tokens (uncached
input + weighted output) over the tenant's weight; a tenant that comes back after a pause is lifted to the lowest
counter among those who wait, so that idleness saves up nothing (VTC, Sheng et al., OSDI 2024). *Deadline*: arrival
plus TTFT target, the earliest first; equal ones in the order of their arrival here.

``pop`` takes entries out one after another; whoever passes over an entry gives it back with ``restore``. Cost of each
operation: logarithmic in what waits. Nothing here knows of workers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from enum import Enum

from tandem.core.policy import RequestClass, Tenant
from tandem.core.snapshot import Depth
from tandem.core.types import Request, RequestKey


class Wait(Enum):
    """What a request that waits waits for."""

    TURN = "turn"  # others go first, or no worker takes anything from anybody: no credit, silent, draining
    CREDIT = "credit"  # the worker of its best plan has more prefill pending than its credit
    ROOM = "room"  # no decode worker has KV room or a seat for it
    GUARD = "guard"  # background: it would slow the streams beside it
    WORKER = "worker"  # no worker of the fleet could take it at all


class Entry:
    """A waiting request."""

    __slots__ = (
        "blocked_since", "cached", "common", "deadline", "homeless_since", "late", "order", "parked", "prefill_s",
        "queued", "request", "request_class", "tokens", "waits_for",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        cached: Mapping[str, int],
        request_class: RequestClass,
        deadline: float,
        tokens: int,
        prefill_s: float,
        order: int,
        common: int = 0,
    ) -> None:
        self.request = request
        self.cached = cached  # prompt tokens, by workers that hold more than all do
        self.request_class = request_class
        self.deadline = deadline
        self.tokens = tokens  # what it counts in queue depth and limits: uncached input + weighted expected output
        self.prefill_s = prefill_s  # on an idle fleet: a lower bound
        self.order = order  # of arrival here
        self.common = common  # cached tokens on every other worker, when it came
        self.queued = True  # False once it left for good; heaps drop it when they meet it
        self.parked = False  # no worker of the fleet as it is could take it
        self.late = False  # runs as best effort, behind the rest of its class
        self.blocked_since: float | None = None  # first time that a hard filter passed it over
        self.homeless_since: float | None = None  # first time that no worker of the fleet could have taken it
        self.waits_for = Wait.TURN  # as it was last looked at

    def __lt__(self, other: Entry) -> bool:
        return (self.deadline, self.order) < (other.deadline, other.order)


class _Tally:
    """Requests and tokens that wait, of one class or tenant."""

    __slots__ = ("requests", "tokens")

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0

    def add(self, entry: Entry) -> None:
        self.requests += 1
        self.tokens += entry.tokens

    def remove(self, entry: Entry) -> None:
        self.requests -= 1
        self.tokens -= entry.tokens


class FairCounters:
    """Service of each tenant in weighted tokens; survives a failover through ``dump`` and ``load``."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._weights = {name: tenant.weight for name, tenant in tenants.items()}
        self._service: dict[str, float] = {}

    def reconfigure(self, tenants: Mapping[str, Tenant]) -> None:
        """New weights for what is charged from now on."""
        self._weights = {name: tenant.weight for name, tenant in tenants.items()}

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def value(self, tenant: str) -> float:
        return self._service.get(tenant, 0.0)

    def charge(self, tenant: str, tokens: float) -> None:
        """Negative = refund. A counter may fall below zero only by rounding, and is kept at zero then."""
        self._service[tenant] = max(0.0, self.value(tenant) + tokens / self.weight(tenant))

    def lift(self, tenant: str, floor: float) -> None:
        if self.value(tenant) < floor:
            self._service[tenant] = floor

    def dump(self) -> dict[str, float]:
        return dict(self._service)

    def load(self, values: Mapping[str, float]) -> None:
        for tenant, value in values.items():
            self._service[tenant] = max(self.value(tenant), value)


class _Lane:
    """Entries of one class, on time or late: a heap of tenants by counter, and per tenant a heap of entries."""

    def __init__(self, request_class: RequestClass, late: bool) -> None:
        self.request_class = request_class
        self.late = late
        self.waiting = 0  # entries that are queued and not parked
        self.heaps: dict[str, list[Entry]] = {}
        self._order: list[tuple[float, str]] = []
        self._hidden: dict[str, list[Entry]] = {}
        self._key: dict[str, float] = {}  # the counter under which a tenant stands in ``_order``; others are stale

    def place(self, tenant: str, counter: float) -> None:
        """(Re)places a tenant in the order, if it has entries here."""
        if self.heaps.get(tenant) and self._key.get(tenant) != counter:
            self._key[tenant] = counter
            heapq.heappush(self._order, (counter, tenant))

    def push(self, entry: Entry, counter: float) -> None:
        tenant = entry.request.tenant
        heapq.heappush(self.heaps.setdefault(tenant, []), entry)
        if tenant not in self._key:
            self.place(tenant, counter)

    def drop(self, tenant: str) -> None:
        self._key.pop(tenant, None)
        self.heaps.pop(tenant, None)

    def hide(self, tenant: str) -> None:
        """Out of the order until ``unhide``."""
        if tenant in self.heaps:
            self._hidden[tenant] = self.heaps[tenant]
            self.drop(tenant)

    def unhide(self, counters: FairCounters) -> None:
        for tenant, heap in self._hidden.items():
            self.heaps[tenant] = heap
            self.place(tenant, counters.value(tenant))
        self._hidden.clear()

    def pop(self, counters: FairCounters) -> Entry | None:
        while self._order:
            counter, tenant = self._order[0]
            if self._key.get(tenant) != counter:
                heapq.heappop(self._order)
                continue
            heap = self.heaps[tenant]
            while heap and not heap[0].queued:
                heapq.heappop(heap)
            current = counters.value(tenant)
            if heap and current > counter:
                self._key[tenant] = current
                heapq.heapreplace(self._order, (current, tenant))
                continue
            entry = heapq.heappop(heap) if heap else None
            if not heap:
                self.drop(tenant)
            if entry is not None:
                return entry
        return None


class FairQueue:
    """See the module docstring."""

    def __init__(self, classes: Iterable[RequestClass], counters: FairCounters, share_window_s: float) -> None:
        self._counters = counters
        self._window = share_window_s
        self._served: dict[str, float] = {}  # tokens by class, decayed over the window
        self._served_at = 0.0
        self._arrange(classes)
        self._tenant_depth: dict[str, _Tally] = {}
        self._parked: dict[RequestKey, Entry] = {}
        self._set_aside: list[Entry] = []
        self._last_floor = 0.0
        self._size = 0

    def _arrange(self, classes: Iterable[RequestClass]) -> None:
        """Empty lanes, in the order in which they are served."""
        ranked = sorted(classes, key=lambda c: (c.background, c.rank, c.name))
        lanes = [_Lane(c, late) for background in (False, True) for late in (False, True) for c in ranked
                 if c.background is background]  # fmt: skip
        self._lanes = {(lane.request_class.name, lane.late): lane for lane in lanes}
        self._served = {c.name: self._served.get(c.name, 0.0) for c in ranked}
        self._class_depth = {c.name: _Tally() for c in ranked}
        self._ranks = {c.name: c.rank for c in ranked}

    def reconfigure(
        self, classes: Iterable[RequestClass], share_window_s: float, waiting: Iterable[Entry], now: float
    ) -> None:
        """``waiting``: all entries that wait, their classes exchanged already. Nobody's service is forgotten."""
        self._decay(now)
        self._window = share_window_s
        self._arrange(classes)
        for entry in waiting:
            self._class_depth[entry.request_class.name].add(entry)
            if not entry.parked:
                lane = self._lane(entry)
                lane.waiting += 1
                lane.push(entry, self._counters.value(entry.request.tenant))

    def __len__(self) -> int:
        return self._size

    # --- in and out -------------------------------------------------------------------------------------------------

    def add(self, entry: Entry) -> None:
        tenant = entry.request.tenant
        self._size += 1
        if tenant not in self._tenant_depth:
            self._counters.lift(tenant, self._floor())
            self._tenant_depth[tenant] = _Tally()
        self._tenant_depth[tenant].add(entry)
        self._class_depth[entry.request_class.name].add(entry)
        lane = self._lane(entry)
        lane.waiting += 1
        lane.push(entry, self._counters.value(tenant))

    def remove(self, entry: Entry) -> None:
        """It leaves for good: dispatched, refused or aborted. Heaps drop it when they meet it."""
        if not entry.queued:
            return
        entry.queued = False
        self._size -= 1
        tenant = entry.request.tenant
        self._last_floor = max(self._last_floor, self._counters.value(tenant))
        depth = self._tenant_depth[tenant]
        depth.remove(entry)
        if not depth.requests:
            del self._tenant_depth[tenant]
        self._class_depth[entry.request_class.name].remove(entry)
        if entry.parked:
            del self._parked[entry.request.key]
        else:
            self._lane(entry).waiting -= 1

    def pop(self, now: float) -> Entry | None:
        """The next entry, taken out of the heaps but still counted as waiting. Background work only comes when
        nothing else waits, or when its class is owed."""
        for lane in self._by_urgency(now):
            entry = lane.pop(self._counters)
            if entry is not None:
                return entry
        return None

    def restore(self, entries: Iterable[Entry]) -> None:
        """Gives back what ``pop`` took out and nobody removed or parked, and whatever was set aside."""
        for lane in self._lanes.values():
            lane.unhide(self._counters)
        for entry in entries:
            if entry.queued and not entry.parked:
                self._lane(entry).push(entry, self._counters.value(entry.request.tenant))

    def set_aside(self, entry: Entry) -> None:
        """Hides the other entries of the same tenant and class until ``restore``."""
        self._lane(entry).hide(entry.request.tenant)

    def park(self, entry: Entry) -> None:
        """A popped entry that no worker of the fleet as it is can take: out of the way until ``unpark``."""
        entry.parked = True
        self._parked[entry.request.key] = entry
        self._lane(entry).waiting -= 1

    def unpark(self) -> None:
        """The fleet has changed: parked entries take their places again."""
        for entry in self._parked.values():
            entry.parked = False
            lane = self._lane(entry)
            lane.waiting += 1
            lane.push(entry, self._counters.value(entry.request.tenant))
        self._parked.clear()

    def demote(self, entry: Entry) -> None:
        """A popped entry that is late from now on runs behind the rest of its class."""
        self._lane(entry).waiting -= 1
        entry.late = True
        self._lane(entry).waiting += 1

    def charge(self, tenant: str, tokens: float) -> None:
        """Service to a tenant; negative = refund."""
        self._counters.charge(tenant, tokens)
        if tokens < 0 and tenant in self._tenant_depth:
            for lane in self._lanes.values():
                lane.place(tenant, self._counters.value(tenant))

    def count_share(self, name: str, tokens: float, now: float) -> None:
        """Service to a class, for its guaranteed share."""
        self._decay(now)
        self._served[name] += tokens

    # --- order ------------------------------------------------------------------------------------------------------

    def _lane(self, entry: Entry) -> _Lane:
        return self._lanes[entry.request_class.name, entry.late]

    def owed(self, request_class: RequestClass, now: float) -> bool:
        """Whether this class has had less than its guaranteed share of what was served lately."""
        if request_class.min_share <= 0.0:
            return False
        self._decay(now)
        return self._served[request_class.name] < request_class.min_share * sum(self._served.values())

    def _by_urgency(self, now: float) -> list[_Lane]:
        waiting = [lane for lane in self._lanes.values() if lane.waiting]
        if len(waiting) < 2:
            return waiting
        owed = [q for q in waiting if not q.late and self.owed(q.request_class, now)]
        foreground = [q for q in waiting if not q.request_class.background]
        return owed + [q for q in (foreground or waiting) if q not in owed]

    def _floor(self) -> float:
        """The lowest counter among tenants who wait; the last served one's when nobody does."""
        if not self._tenant_depth:
            return self._last_floor
        return min(self._counters.value(tenant) for tenant in self._tenant_depth)

    def _decay(self, now: float) -> None:
        if now > self._served_at:
            factor = math.exp((self._served_at - now) / self._window)
            for name in self._served:
                self._served[name] *= factor
            self._served_at = now

    # --- readings ---------------------------------------------------------------------------------------------------

    def depth_by_class(self) -> dict[str, Depth]:
        return {name: Depth(d.requests, d.tokens) for name, d in self._class_depth.items()}

    def depth_by_tenant(self) -> dict[str, Depth]:
        return {name: Depth(d.requests, d.tokens) for name, d in self._tenant_depth.items()}

    def tokens_up_to(self, rank: int) -> int:
        """Tokens that wait in classes of this rank or better."""
        tokens = 0
        for name, depth in self._class_depth.items():
            if self._ranks[name] <= rank:
                tokens += depth.tokens
        return tokens

    def tokens_of(self, tenant: str) -> int:
        depth = self._tenant_depth.get(tenant)
        return depth.tokens if depth else 0

    def share_of(self, tenant: str) -> float:
        """Of the service, while all who wait now go on waiting."""
        weight = self._counters.weight(tenant)
        others = sum(self._counters.weight(name) for name in self._tenant_depth if name != tenant)
        return weight / (weight + others)

    @property
    def parked(self) -> Iterable[Entry]:
        """In the order in which they were parked."""
        return self._parked.values()

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    def waiting_tenants(self) -> Iterable[str]:
        return self._tenant_depth.keys()
