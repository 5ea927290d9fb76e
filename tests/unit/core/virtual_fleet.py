"""A fleet in virtual time that the scheduler drives: workers compute prompts one after another and decode at a fixed
pace. Small on purpose: what is tested is the scheduler, not an engine.

Everything the scheduler is told can be late, repeated or lost, as on the real bus; what it decides is recorded.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from msgspec import structs

from tandem.core.effects import Place, Recall, Refuse
from tandem.core.placement import suffix_context
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.profiles import profile_named
from tandem.core.scheduler import Scheduler
from tandem.core.types import Request, RequestKey, Role, WorkerAddress, WorkerLoad, WorkerSpec
from tandem.errors import TandemError

PROFILE = "sim-h100-llama-70b-tp4"


def spec(worker: str, role: Role, **changes: object) -> WorkerSpec:
    base = WorkerSpec(
        address=WorkerAddress(worker, 1),
        model="m",
        role=role,
        slot=0,
        block_size=16,
        dtype="bfloat16",
        kv_layout="x",
        engine="sim",
        engine_version="1",
        max_model_len=32768,
        kv_blocks_total=20000,
        kv_bytes_per_token=327680,
        max_batched_tokens=8192 if role is Role.PREFILL else 1024,
        max_num_seqs=256,
        perf_profile=PROFILE,
        kv_endpoint="here",
        link_bytes_per_s=50e9,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def request(name: str, *, isl: int = 2000, osl: int = 200, at: float = 0.0, **changes: object) -> Request:
    base = Request(RequestKey(name), "m", isl, osl, arrival_s=at, timeout_s=600.0)
    return structs.replace(base, **changes)  # type: ignore[arg-type]


@dataclass
class Server:
    """One worker: prompts one after another, any number of decodes."""

    spec: WorkerSpec
    free_at: float = 0.0
    prefilling: dict[RequestKey, int] = field(default_factory=dict)
    held_blocks: dict[RequestKey, int] = field(default_factory=dict)
    peak_blocks: int = 0
    served_s: float = 0.0

    def prefill_s(self, tokens: int, context: float) -> float:
        p = profile_named(self.spec.perf_profile)
        steps = -(-tokens // self.spec.max_batched_tokens)
        return p.p0 * steps + p.p1 * tokens + p.p2 * context


class VirtualFleet:
    """Drives one ``Scheduler``. ``tpot_s``: pace of all decodes."""

    def __init__(
        self,
        specs: list[WorkerSpec],
        *,
        policy: Policy | None = None,
        classes: Mapping[str, RequestClass] | None = None,
        tenants: Mapping[str, Tenant] | None = None,
        tpot_s: float = 0.02,
        lose: float = 0.0,
        report_every_s: float = 0.1,
        seed: int = 0,
        start: float = 0.0,
    ) -> None:
        self.now = start
        self.scheduler = Scheduler(
            policy or Policy(), classes=classes or {}, tenants=tenants or {}, rng=random.Random(seed)
        )
        self.servers = {s.id: Server(s) for s in specs}
        self.tpot_s = tpot_s
        self.placed: dict[RequestKey, tuple[float, Place]] = {}
        self.refused: dict[RequestKey, TandemError] = {}
        self.recalled: list[RequestKey] = []
        self.first_token: dict[RequestKey, float] = {}
        self.finished: dict[RequestKey, float] = {}
        self.aborted: set[RequestKey] = set()
        self.output: dict[RequestKey, int] = {}
        self.after_poll: Callable[[VirtualFleet], None] | None = None
        self._rng = random.Random(seed + 1)
        self._lose = lose
        self._report_every_s = report_every_s
        self._work = 0  # events that are no reports
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()
        for each in specs:
            self.scheduler.worker_up(each, self.now)
        if report_every_s:
            self._push(start + report_every_s, self._reports)

    # --- what the test does -----------------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[[], None]) -> None:
        def work() -> None:
            self._work -= 1
            action()

        self._work += 1
        self._push(when, work)

    def _push(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._ids), action))

    def submit(self, req: Request, cached: Mapping[str, int] | None = None, output: int | None = None) -> None:
        """Now. Refusals are recorded like those of ``poll``."""
        self.output[req.key] = req.max_osl_tokens if output is None else output
        try:
            self.scheduler.submit(req, cached or {}, self.now)
        except TandemError as error:
            self.refused[req.key] = error

    def arrive(self, req: Request, cached: Mapping[str, int] | None = None, output: int | None = None) -> None:
        """At its ``arrival_s``."""
        self.at(req.arrival_s, lambda: self.submit(req, cached, output))

    def abort(self, key: RequestKey) -> None:
        self.aborted.update(self.scheduler.abort(key.id, key.attempt, self.now))
        for server in self.servers.values():
            server.held_blocks.pop(key, None)
            server.prefilling.pop(key, None)

    def kill(self, worker: str) -> list[RequestKey]:
        server = self.servers.pop(worker)
        return self.scheduler.worker_down(worker, server.spec.address.incarnation, self.now)

    def poll(self) -> None:
        for effect in self.scheduler.poll(self.now):
            match effect:
                case Place():
                    assert effect.request.key not in self.placed, "placed twice"
                    self.placed[effect.request.key] = (self.now, effect)
                    self._run(effect)
                case Refuse():
                    assert effect.request.key not in self.refused, "refused twice"
                    self.refused[effect.request.key] = effect.error
                case Recall():
                    self.recalled.append(effect.request.key)
                    for server in self.servers.values():
                        if effect.request.key in server.prefilling:
                            server.free_at = self.now
                        server.prefilling.pop(effect.request.key, None)
                        server.held_blocks.pop(effect.request.key, None)
        if self.after_poll is not None:
            self.after_poll(self)

    def drain(self, limit: float = 2000.0) -> None:
        """Until nothing is left to happen but reports."""
        self.run(limit, only_work=True)

    def run(self, until: float, *, only_work: bool = False) -> None:
        self.poll()
        while True:
            if only_work and not self._work and not self.scheduler.queued():
                return
            wake = self.scheduler.next_wakeup(self.now)
            event = self._events[0][0] if self._events else None
            times = [t for t in (wake, event) if t is not None]
            if not times or min(times) > until:
                self.now = until
                return
            self.now = max(self.now, min(times))
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self.poll()

    # --- the workers ------------------------------------------------------------------------------------------------

    def _run(self, place: Place) -> None:
        key, plan, isl = place.request.key, place.plan, place.request.isl_tokens
        first, decode = self.servers[plan.first_worker], self.servers[plan.decode_worker]
        fresh = isl - place.cached_tokens
        seconds = first.prefill_s(fresh, suffix_context(isl, place.cached_tokens))
        first.free_at = max(first.free_at, self.now) + seconds
        first.served_s += seconds
        first.prefilling[key] = fresh
        self._hold(first, key, isl)
        done_at = first.free_at
        self.at(done_at, lambda: self._prefilled(place))
        if plan.prefill_worker is not None:
            self._hold(decode, key, isl)
            size = (isl - 0) * decode.spec.kv_bytes_per_token
            done_at += size / decode.spec.link_bytes_per_s + self.tpot_s
            self.at(done_at, lambda: self._decoding(place))

    def _hold(self, server: Server, key: RequestKey, tokens: int) -> None:
        server.held_blocks[key] = -(-tokens // server.spec.block_size)
        server.peak_blocks = max(server.peak_blocks, sum(server.held_blocks.values()))

    def _gone(self, place: Place) -> bool:
        key = place.request.key
        workers = {place.plan.first_worker, place.plan.decode_worker}
        return key in self.aborted or key in self.recalled or not workers <= self.servers.keys()

    def _prefilled(self, place: Place) -> None:
        if self._gone(place):
            return
        key = place.request.key
        self.servers[place.plan.first_worker].prefilling.pop(key, None)
        self._tell(lambda: self.scheduler.prefill_done(key, self.now))
        if place.plan.prefill_worker is None:
            self._decoding(place)

    def _decoding(self, place: Place) -> None:
        if self._gone(place):
            return
        key = place.request.key
        self.first_token.setdefault(key, self.now)
        if place.plan.prefill_worker is not None:
            self.servers[place.plan.prefill_worker].held_blocks.pop(key, None)
        self._tell(lambda: self.scheduler.decode_started(key, self.now))
        self.at(self.now + self.tpot_s * self.output[key], lambda: self._finish(place))

    def _finish(self, place: Place) -> None:
        if self._gone(place):
            return
        key = place.request.key
        self.finished[key] = self.now
        self.servers[place.plan.decode_worker].held_blocks.pop(key, None)
        self._tell(lambda: self.scheduler.finished(key, self.output[key], place.cached_tokens, self.now))

    def _tell(self, event: Callable[[], None]) -> None:
        if self._lose == 0.0 or self._rng.random() >= self._lose:
            event()

    def _reports(self) -> None:
        for server in self.servers.values():
            load = WorkerLoad(
                worker=server.spec.id,
                incarnation=server.spec.address.incarnation,
                running_requests=len(server.held_blocks),
                pending_prefill_tokens=sum(server.prefilling.values()),
                pending_prefill_context_tokens=sum(n * n // 2 for n in server.prefilling.values()),
                kv_blocks_used=sum(server.held_blocks.values()),
                kv_blocks_total=server.spec.kv_blocks_total,
                kv_tokens=16 * sum(server.held_blocks.values()),
            )
            self._push(self.now + 0.05, lambda load=load: self.scheduler.worker_load(load, self.now))  # type: ignore[misc]
        self._push(self.now + self._report_every_s, self._reports)
