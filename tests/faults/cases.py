"""Which process is harmed, and how: the columns and rows of the fault matrix."""

from __future__ import annotations

import asyncio
import shutil
import signal
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tandem.adapters.embedded import RedisServer
from tandem.errors import TandemError
from tests.harness.site import Site

PAUSE_S = 5.0
#: `tandem up` brings what was killed back; a real engine loads its model first.
RESTART_S = 60.0


class Fault(Enum):
    KILL = "kill -9"
    PAUSE = "SIGSTOP 5 s"
    RESTART = "restart"


class Target(Enum):
    PREFILL = "prefill worker"
    DECODE = "decode worker"
    ROUTER = "router, alone"
    LEADER = "router, with a standby"
    FRONTEND = "frontend"
    NATS = "NATS"
    REDIS = "Redis"
    REDIS_EMPTY = "Redis, back empty"
    LEADER_AND_REDIS = "leader and Redis, back empty"

    @property
    def is_worker(self) -> bool:
        return self in (Target.PREFILL, Target.DECODE)

    @property
    def is_redis(self) -> bool:
        return self in (Target.REDIS, Target.REDIS_EMPTY, Target.LEADER_AND_REDIS)

    @property
    def routers(self) -> int:
        return 2 if self in (Target.LEADER, Target.LEADER_AND_REDIS) else 1


@dataclass(frozen=True)
class Case:
    target: Target
    fault: Fault

    @property
    def name(self) -> str:
        return f"{self.target.value}: {self.fault.value}"


#: A pause empties nothing; the last target is there for the epoch, which must grow though nobody remembers it.
_NOT = {
    (Target.REDIS_EMPTY, Fault.PAUSE),
    (Target.LEADER_AND_REDIS, Fault.PAUSE),
    (Target.LEADER_AND_REDIS, Fault.RESTART),
}
CASES = [Case(target, fault) for target in Target for fault in Fault if (target, fault) not in _NOT]


class Store(RedisServer):
    """A Redis of the command's own, which keeps its data over a restart unless it is told to lose them."""

    def __init__(self, folder: Path) -> None:
        self._data = folder
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(changed={"dir": str(folder), "appendonly": "yes"})

    async def come_back(self, *, empty: bool) -> None:
        if empty:
            shutil.rmtree(self._data)
            self._data.mkdir()
        await self.start()


class Harm:
    """Does what a case says, to a cluster, and sees to it that what was harmed comes back."""

    def __init__(self, case: Case, site: Site, store: Store) -> None:
        self.case = case
        self.victim = ""
        self._site = site
        self._store = store
        self._pid = 0

    def choose(self) -> None:
        """The busiest, where there are several."""
        site, target = self._site, self.case.target
        match target:
            case Target.PREFILL | Target.DECODE:
                kind = "prefill" if target is Target.PREFILL else "decode"
                names = [worker["name"] for worker in site.processes(kind)]
                loads = site.loads()
                self.victim = max(names, key=lambda name: loads[name].load.running_requests)
            case Target.ROUTER | Target.FRONTEND:
                self.victim = target.value.split(",")[0]
            case Target.LEADER | Target.LEADER_AND_REDIS:
                self.victim = site.name_of_leader()
            case Target.NATS:
                self.victim = "nats-server"

    def streams_on_victim(self) -> int:
        return self._site.loads()[self.victim].load.running_requests if self.case.target is Target.DECODE else 0

    async def do(self) -> None:
        """Returns when the fault is over: what was paused runs; what was killed may still be coming back."""
        if self.case.target.is_redis:
            await self._to_redis()
        if self.victim:
            await self._to_victim()

    async def _to_redis(self) -> None:
        store, empty = self._store, self.case.target is not Target.REDIS
        match self.case.fault:
            case Fault.PAUSE:
                store.pause()
                await asyncio.sleep(PAUSE_S)
                return store.resume()
            case Fault.KILL:
                await asyncio.to_thread(store.kill)
            case Fault.RESTART:
                await store.stop()
        await asyncio.sleep(0.5)  # as long as a supervisor takes to notice and to start it
        return await store.come_back(empty=empty)

    async def _to_victim(self) -> None:
        site, name = self._site, self.victim
        match self.case.fault:
            case Fault.PAUSE:
                site.signal_whole(name, signal.SIGSTOP)
                try:
                    await asyncio.sleep(PAUSE_S)
                finally:
                    site.signal_whole(name, signal.SIGCONT)
            case Fault.KILL:
                self._pid = site.signal(name, signal.SIGKILL)
            case Fault.RESTART:
                self._pid = site.signal(name, signal.SIGTERM)

    async def healed(self) -> None:
        """Returns when everything runs again."""
        if self._pid:
            await asyncio.to_thread(self._site.wait_restarted, self.victim, self._pid, RESTART_S)


async def heal(site: Site, store: Store) -> None:
    """After a case that broke off: nothing stays paused or away."""
    site.resume_all()
    if not store.running:
        try:
            await store.start()
        except TandemError as error:
            raise AssertionError(f"Redis does not come back: {error}") from error
    else:
        store.resume()
