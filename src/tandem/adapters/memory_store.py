"""The stores without a server: what shares a ``MemoryStore`` in one process shares its data.

Same semantics as ``redis_store`` (tests/contract/ runs over both), outages included: ``available = False`` is a server
that went away, ``wipe`` one that came back empty. Time is an argument, so that tests need not wait.
"""

from __future__ import annotations

import asyncio
import dataclasses
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tandem.adapters.clock import monotonic
from tandem.adapters.store import MAX_SLOTS, SHARED_BY_A_MODEL, Found, Lease
from tandem.core.holders import Depths
from tandem.core.types import WorkerSpec
from tandem.errors import IncompatibleWorker, StoreUnavailable

Owner = tuple[str, int]  # worker, incarnation


@dataclass(slots=True)
class _Entry:
    spec: WorkerSpec
    expires: float


@dataclass(slots=True)
class _Index:
    slots: dict[int, Owner] = field(default_factory=dict)
    blocks: dict[int, set[int]] = field(default_factory=dict)  # slot -> sequence hashes


@dataclass(slots=True)
class _Held:
    lease: Lease
    expires: float


class MemoryStore:
    def __init__(self, *, now: Callable[[], float] = monotonic, max_slots: int = MAX_SLOTS) -> None:
        self.now = now
        self.max_slots = max_slots
        self.available = True
        self.wipe()

    def wipe(self) -> None:
        self.entries: dict[str, _Entry] = {}
        self.indexes: dict[str, _Index] = {}
        self.leases: dict[str, _Held] = {}
        self.epochs: dict[str, int] = {}
        self.counters: dict[str, dict[str, float]] = {}

    def check(self) -> None:
        if not self.available:
            raise StoreUnavailable("the store is away")

    def entry(self, worker: str) -> _Entry | None:
        entry = self.entries.get(worker)
        if entry is not None and entry.expires <= self.now():
            del self.entries[worker]
            return None
        return entry

    def living(self) -> list[_Entry]:
        return [entry for worker in list(self.entries) if (entry := self.entry(worker)) is not None]

    def index(self, model: str) -> _Index:
        return self.indexes.setdefault(model, _Index())

    def retire(self, model: str, slot: int) -> None:
        """Nothing is left to sweep here: the slot is free at once."""
        index = self.index(model)
        index.slots.pop(slot, None)
        index.blocks.pop(slot, None)

    def owns(self, spec: WorkerSpec) -> bool:
        return self.index(spec.model).slots.get(spec.slot) == _owner(spec)


def _owner(spec: WorkerSpec) -> Owner:
    return spec.id, spec.address.incarnation


class MemoryRegistry:
    """See ``tandem.adapters.store.Registry``."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def register(self, spec: WorkerSpec, *, ttl_s: float) -> WorkerSpec:
        store = self._store
        store.check()
        for entry in store.living():
            if entry.spec.model == spec.model and entry.spec.id != spec.id:
                _check_compatible(spec, entry.spec)
        old = store.entry(spec.id)
        if old is not None and (old.spec.model, _owner(old.spec)) != (spec.model, _owner(spec)):
            if store.owns(old.spec):
                store.retire(old.spec.model, old.spec.slot)
            del store.entries[spec.id]
        spec = dataclasses.replace(spec, slot=self._slot_for(spec))
        store.index(spec.model).slots[spec.slot] = _owner(spec)
        store.entries[spec.id] = _Entry(spec, store.now() + ttl_s)
        return spec

    def _slot_for(self, spec: WorkerSpec) -> int:
        store, slots = self._store, self._store.index(spec.model).slots
        for slot, owner in list(slots.items()):
            if owner == _owner(spec):
                return slot
            entry = store.entry(owner[0])
            if entry is None or _owner(entry.spec) != owner:
                store.retire(spec.model, slot)
        for slot in range(store.max_slots):
            if slot not in slots:
                return slot
        raise StoreUnavailable(f"all {store.max_slots} slots of {spec.model} are leased")

    async def refresh(self, spec: WorkerSpec, *, ttl_s: float) -> bool:
        self._store.check()
        entry = self._store.entry(spec.id)
        if entry is None or _owner(entry.spec) != _owner(spec) or not self._store.owns(spec):
            return False
        self._store.entries[spec.id] = _Entry(spec, self._store.now() + ttl_s)
        return True

    async def deregister(self, spec: WorkerSpec) -> None:
        self._store.check()
        entry = self._store.entry(spec.id)
        if entry is not None and _owner(entry.spec) == _owner(spec):
            del self._store.entries[spec.id]
        if self._store.owns(spec):
            self._store.retire(spec.model, spec.slot)

    async def workers(self, model: str) -> list[WorkerSpec]:
        return [spec for spec in await self.all_workers() if spec.model == model]

    async def all_workers(self) -> list[WorkerSpec]:
        self._store.check()
        return [entry.spec for entry in self._store.living()]


def _check_compatible(spec: WorkerSpec, other: WorkerSpec) -> None:
    differing = [name for name in SHARED_BY_A_MODEL if getattr(spec, name) != getattr(other, name)]
    if abs(spec.wire_version - other.wire_version) > 1:
        differing.append("wire_version")
    for name in differing:
        raise IncompatibleWorker(
            f"worker {spec.id} has {name} {getattr(spec, name)}, but the workers of {spec.model} "
            f"(such as {other.id}) have {getattr(other, name)}",
            param=name,
        )


class MemoryLeases:
    """See ``tandem.adapters.store.Leases``."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def acquire(self, model: str, holder: str, *, ttl_s: float, epoch_at_least: int) -> Lease | None:
        store = self._store
        store.check()
        held = store.leases.get(model)
        if held is not None and held.expires > store.now() and held.lease.holder != holder:
            return None
        epoch = store.epochs[model] = max(store.epochs.get(model, 0) + 1, epoch_at_least)
        lease = Lease(model, holder, epoch)
        store.leases[model] = _Held(lease, store.now() + ttl_s)
        return lease

    async def renew(self, lease: Lease, *, ttl_s: float) -> bool:
        store = self._store
        store.check()
        held = store.leases.get(lease.model)
        if held is None or held.lease != lease or held.expires <= store.now():
            return False
        held.expires = store.now() + ttl_s
        return True

    async def release(self, lease: Lease) -> None:
        self._store.check()
        held = self._store.leases.get(lease.model)
        if held is not None and held.lease == lease:
            del self._store.leases[lease.model]


class MemoryPrefixIndex:
    """See ``tandem.adapters.store.PrefixIndex``."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def lookup(self, model: str, hashes: bytes) -> Depths:
        return self._look_up(model, hashes)

    def ask(self, model: str, prompts: Sequence[bytes], tell: Callable[[Found], None]) -> None:
        found: Found
        try:
            found = [self._look_up(model, hashes) for hashes in prompts]
        except StoreUnavailable as error:
            found = error
        asyncio.get_running_loop().call_soon(tell, found)

    def _look_up(self, model: str, hashes: bytes) -> Depths:
        self._store.check()
        index = self._store.index(model)
        wanted = array("Q", hashes)
        depths = {slot: _depth(wanted, index.blocks.get(slot, set())) for slot in index.slots}
        return Depths.of({slot: depth for slot, depth in depths.items() if depth})

    async def update(self, spec: WorkerSpec, *, add: Sequence[int], remove: Sequence[int]) -> bool:
        self._store.check()
        if not self._store.owns(spec):
            return False
        blocks = self._store.index(spec.model).blocks.setdefault(spec.slot, set())
        blocks.difference_update(remove)
        blocks.update(add)
        return True

    async def drop(self, spec: WorkerSpec) -> None:
        self._store.check()
        if self._store.owns(spec):
            self._store.index(spec.model).blocks.pop(spec.slot, None)

    async def size(self, model: str) -> int:
        self._store.check()
        return len(set[int]().union(*self._store.index(model).blocks.values()))


def _depth(wanted: Sequence[int], held: set[int]) -> int:
    for depth, block in enumerate(wanted):
        if block not in held:
            return depth
    return len(wanted)


class MemoryCounters:
    """See ``tandem.adapters.store.Counters``."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def load(self, name: str) -> Mapping[str, float]:
        self._store.check()
        return dict(self._store.counters.get(name, {}))

    async def save(self, name: str, values: Mapping[str, float]) -> None:
        self._store.check()
        self._store.counters[name] = dict(values)
