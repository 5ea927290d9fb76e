"""Who leads a model: a lease in Redis, an epoch that never goes back, announcements on the bus.

The epoch is max(last epoch in the store + 1, any epoch heard + 1, unix milliseconds), so that it grows even when Redis
comes back empty. A leader that cannot reach Redis goes on; what ends its term is a lost lease or a higher epoch heard.
Two leaders for a moment cost fairness, never correctness: workers refuse the older epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tandem.adapters import clock
from tandem.adapters.bus import Bus, Message
from tandem.adapters.store import Lease, Leases
from tandem.errors import BusUnavailable, StoreUnavailable
from tandem.v1 import bus_pb2
from tandem.wire import subjects

log = logging.getLogger(__name__)


class Leadership:
    """For one model. ``elected(epoch)`` returns the highest epoch that the workers know; ``deposed`` ends a term."""

    def __init__(
        self,
        *,
        bus: Bus,
        leases: Leases,
        cluster: str,
        model: str,
        router: str,
        lease_ttl_s: float,
        announce_interval_s: float,
        elected: Callable[[int], Awaitable[int]],
        deposed: Callable[[], None],
    ) -> None:
        self._bus = bus
        self._leases = leases
        self._subject = subjects.leader(cluster, model)
        self._model = model
        self._router = router
        self._ttl_s = lease_ttl_s
        self._interval_s = announce_interval_s
        self._elected = elected
        self._deposed = deposed
        self._lease: Lease | None = None
        #: Highest epoch heard from anyone, and whose it is.
        self.heard_epoch = 0
        self.leader = ""

    @property
    def epoch(self) -> int:
        """Ours while we lead, else 0."""
        return self._lease.epoch if self._lease else 0

    def hear(self, epoch: int) -> None:
        """An epoch seen on a worker or another router."""
        self.heard_epoch = max(self.heard_epoch, epoch)
        if self._lease is not None and self.heard_epoch > self._lease.epoch:
            log.warning("%s: epoch %d heard, ours is %d: stepping down", self._model, epoch, self._lease.epoch)
            self._step_down()

    async def run(self) -> None:
        """Until cancelled; then the lease is given back."""
        await self._bus.subscribe(self._subject, self._on_announcement)
        try:
            while True:
                if self._lease is None:
                    await self._campaign()
                else:
                    await self._hold(self._lease)
                await asyncio.sleep(self._interval_s)
        finally:
            await self._give_back()

    async def _campaign(self) -> None:
        floor = max(self.heard_epoch + 1, clock.unix_milliseconds())
        try:
            lease = await self._leases.acquire(self._model, self._router, ttl_s=self._ttl_s, epoch_at_least=floor)
        except StoreUnavailable as error:
            log.warning("%s: no election without the store: %s", self._model, error)
            return
        if lease is None:
            return
        known = max(await self._elected(lease.epoch), self.heard_epoch)
        if known > lease.epoch:
            # Somebody has heard of a later leader than the store has. The next campaign begins above it.
            self.heard_epoch = known
            return await self._release(lease)
        self._lease = lease
        self.leader = self._router
        self.heard_epoch = lease.epoch
        log.info("%s: leading with epoch %d", self._model, lease.epoch)
        self._announce(lease)

    async def _hold(self, lease: Lease) -> None:
        try:
            kept = await self._leases.renew(lease, ttl_s=self._ttl_s)
        except StoreUnavailable:
            kept = True  # nobody else can be elected without the store either
        if self._lease is None:
            return
        if not kept:
            # Expired, or the store came back empty. If it is free, the term goes on with a higher epoch.
            log.warning("%s: the lease is not ours any more", self._model)
            self._lease = None
            await self._campaign()
            if self._lease is None:
                self._deposed()
            return
        self._announce(lease)

    def _announce(self, lease: Lease) -> None:
        message = bus_pb2.LeaderAnnouncement(model=self._model, router=self._router, epoch=lease.epoch)
        try:
            self._bus.publish(self._subject, message.SerializeToString())
        except BusUnavailable as error:
            log.warning("announcement not sent: %s", error)

    def _on_announcement(self, message: Message) -> None:
        announcement = bus_pb2.LeaderAnnouncement.FromString(message.data)
        if announcement.router != self._router:
            if announcement.epoch >= self.heard_epoch:
                self.leader = announcement.router
            self.hear(announcement.epoch)

    def _step_down(self) -> None:
        self._lease = None
        self._deposed()

    async def _give_back(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._release(lease)

    async def _release(self, lease: Lease) -> None:
        try:
            await asyncio.wait_for(self._leases.release(lease), 1.0)
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("lease not released: %s", error)
