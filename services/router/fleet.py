"""Which workers of one model are there, and how alive they are. Decides nothing about requests.

*Alive*; *suspect* (silent for ``suspect_s``: gets no new work, keeps what it has); *hung* (silent for the hop timeout,
and its gRPC health does not answer); *dead* (the same for ``dead_s``, or silent and its port refuses: no such
process). When our own bus connection is in doubt (down, up again for less than the grace, or not answering a flush),
nobody is hung or dead: what is silent then is the bus.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.adapters.bus import Bus
from tandem.adapters.deployment import Liveness
from tandem.adapters.grpc_server import open_channel
from tandem.adapters.store import Registry
from tandem.core.holders import Slots
from tandem.core.types import WorkerSpec
from tandem.errors import BusUnavailable, StoreUnavailable
from tandem.v1 import bus_pb2

log = logging.getLogger(__name__)

BUS_GRACE_S = 3.0
TICK_S = 0.1


@dataclass(slots=True)
class Member:
    spec: WorkerSpec
    heard_at: float
    report: bus_pb2.LoadReport | None = None
    suspect: bool = False
    probe: asyncio.Task[None] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Loss:
    worker: str
    incarnation: int
    why: str
    #: Its process is known to be dead, not merely silent.
    gone: bool


@dataclass(frozen=True, slots=True)
class FleetListener:
    """Whom the fleet tells."""

    up: Callable[[WorkerSpec], None]
    suspect: Callable[[str, bool], None]
    lost: Callable[[Loss], None]
    #: (worker)
    hung: Callable[[str], None]


class Fleet:
    def __init__(
        self,
        *,
        bus: Bus,
        registry: Registry,
        model: str,
        liveness: Liveness,
        hop_timeout_s: float,
        listener: FleetListener,
        now: Callable[[], float],
    ) -> None:
        self._bus = bus
        self._registry = registry
        self._model = model
        self._liveness = liveness
        self._hop_timeout_s = hop_timeout_s
        #: Who is silent for longer is asked: in time to know at the hop timeout whether it hangs.
        self._patience_s = min(liveness.suspect_s, hop_timeout_s / 2)
        self._listener = listener
        self._now = now
        self._look_now = asyncio.Event()
        self.members: dict[str, Member] = {}
        self._slots: Slots | None = None
        #: Declared dead while their registry entry lives on; only a report of their own brings them back.
        self._dead: set[tuple[str, int]] = set()

    # -- what is heard ---------------------------------------------------------------------------------------------

    def heard(self, report: bus_pb2.LoadReport) -> bool:
        """A load report came. False if it is from a process that is not (yet, or any more) a member."""
        worker, incarnation = report.worker.id, report.worker.incarnation
        if self._dead:
            self._dead.discard((worker, incarnation))
        member = self.members.get(worker)
        if member is None or member.spec.address.incarnation != incarnation:
            self._look_now.set()
            return False
        member.heard_at = self._now()
        member.report = report
        if member.suspect:
            member.suspect = False
            self._listener.suspect(member.spec.id, False)
        return True

    def no_responders(self, worker: str) -> None:
        """Nobody listens on the worker's subject: ask it at once, do not wait for the silence to grow."""
        member = self.members.get(worker)
        if member is not None and not self.bus_in_doubt():
            self._make_suspect(member)
            self._probe(member)

    def bus_in_doubt(self) -> bool:
        settling = self._bus.stats.reconnects > 0 and self._now() - self._bus.reconnected_at < BUS_GRACE_S
        return settling or not self._bus.connected

    # -- loops -----------------------------------------------------------------------------------------------------

    async def watch_registry(self, interval_s: float) -> None:
        while True:
            await self.look()
            try:
                await asyncio.wait_for(self._look_now.wait(), interval_s)
                await asyncio.sleep(0.02)
            except TimeoutError:
                pass
            self._look_now.clear()

    async def look(self) -> None:
        """At the registry, once."""
        try:
            self._seen(await self._registry.workers(self._model))
        except StoreUnavailable as error:
            log.warning("registry not read: %s", error)

    async def watch_silence(self) -> None:
        """As soon as anybody may be silent for too long, and at every tick while somebody is."""
        while True:
            silent = max(map(self._silent_s, self.members.values()), default=0.0)
            await asyncio.sleep(max(TICK_S, self._patience_s - silent))
            self.look_for_silence()

    def look_for_silence(self) -> None:
        if self.bus_in_doubt():
            return
        for member in list(self.members.values()):
            silent = self._silent_s(member)
            if silent > self._liveness.suspect_s:
                self._make_suspect(member)
            if silent > self._patience_s:
                self._probe(member)

    async def close(self) -> None:
        probes = [member.probe for member in self.members.values() if member.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    # -- inside ----------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> Slots:
        """Members by their slot in the prefix index. Kept: every request asks."""
        if self._slots is None:
            specs = [member.spec for member in self.members.values()]
            block_size = specs[0].block_size if specs else 1
            self._slots = Slots([(spec.id, spec.slot) for spec in specs], block_size)
        return self._slots

    def _seen(self, specs: list[WorkerSpec]) -> None:
        now = self._now()
        self._dead &= {(spec.id, spec.address.incarnation) for spec in specs}
        for spec in specs:
            if (spec.id, spec.address.incarnation) in self._dead:
                continue
            member = self.members.get(spec.id)
            if member is not None and member.spec.address.incarnation != spec.address.incarnation:
                self._remove(member, "restarted", gone=True)
                member = None
            if member is None:
                log.info("worker %s joins (%s, %s)", spec.id, spec.role.value, spec.address.grpc_address)
                self.members[spec.id] = Member(spec, now)
                self._slots = None
                self._listener.up(spec)
            elif member.spec != spec:
                member.spec = spec
                self._slots = None
                self._listener.up(spec)
        present = {spec.id for spec in specs}
        for member in list(self.members.values()):
            # Gone from the registry and silent: it left in good order, or the store lost it and it will be back.
            if member.spec.id not in present and now - member.heard_at > self._liveness.suspect_s:
                if member.spec.draining:
                    self._remove(member, "left", gone=True)
                else:
                    self._probe(member)

    def _make_suspect(self, member: Member) -> None:
        if not member.suspect:
            member.suspect = True
            self._listener.suspect(member.spec.id, True)

    def _probe(self, member: Member) -> None:
        if member.probe is None or member.probe.done():
            member.probe = asyncio.get_running_loop().create_task(self._ask(member))

    async def _ask(self, member: Member) -> None:
        """A silent worker for its gRPC health. Refused = no such process. No answer = hung; dead after ``dead_s``."""
        heard_at = member.heard_at
        code = await self._health(member.spec.address.grpc_address)
        if code is None or self.bus_in_doubt():
            return
        try:
            await self._bus.flush(timeout_s=1.0)
        except BusUnavailable:
            return
        if self.members.get(member.spec.id) is not member or member.heard_at != heard_at:
            return
        silent = self._silent_s(member)
        gone = code is grpc.StatusCode.UNAVAILABLE and await _refuses(member.spec.address.grpc_address)
        if gone or silent > self._liveness.dead_s:
            self._remove(member, f"health {code.name}, silent for {silent:.1f} s", gone=gone)
        elif silent > self._hop_timeout_s:
            self._listener.hung(member.spec.id)

    async def _health(self, address: str) -> grpc.StatusCode | None:
        """None = it answers. By a channel of its own: one that has known better days fails without asking."""
        async with open_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=self._hop_timeout_s / 2)
            except grpc.aio.AioRpcError as error:
                return error.code()
        return None

    def _silent_s(self, member: Member) -> float:
        return self._now() - max(member.heard_at, self._bus.reconnected_at)

    def _remove(self, member: Member, why: str, *, gone: bool) -> None:
        log.warning("worker %s is gone: %s", member.spec.id, why)
        address = member.spec.address
        del self.members[address.id]
        self._slots = None
        self._dead.add((address.id, address.incarnation))
        self._listener.lost(Loss(address.id, address.incarnation, why, gone))


async def _refuses(address: str) -> bool:
    """Whether nobody listens there: the process is gone. A stopped process's kernel goes on to accept, and gRPC calls
    both of them UNAVAILABLE."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(1.0):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False
