"""Ports to what lives in Redis: the worker registry, leader leases and the prefix index; and their in-memory twins.

Every method that touches Redis raises StoreUnavailable when it is away; each call has a deadline of its own
(``timeout_s`` of the adapter). tests/contract/ runs the same suites over the twins and the real server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.core.holders import Depths
from tandem.core.types import WorkerSpec
from tandem.errors import TandemError

#: Fields of WorkerSpec in which all workers of a model must agree. ``wire_version`` may differ by one.
SHARED_BY_A_MODEL = ("block_size", "dtype", "kv_layout", "engine", "engine_version")
#: Workers of one model, with those whose slots are not swept yet.
MAX_SLOTS = 2048


class Registry(Protocol):
    """Who is there. Entries live for ``ttl_s`` unless refreshed."""

    async def register(self, spec: WorkerSpec, *, ttl_s: float) -> WorkerSpec:
        """Leases a slot of the model's index for (worker id, incarnation) and writes the entry; returns the spec with
        its slot.

        The first worker of a model fixes block size, dtype, KV layout, engine and engine version: IncompatibleWorker,
        naming both values, when this one differs from the living ones. A restarted worker (same id, new incarnation)
        replaces its old entry at once; the old slot is masked out of every lookup and swept before it is used again.
        """
        ...

    async def refresh(self, spec: WorkerSpec, *, ttl_s: float) -> bool:
        """Renews the entry (role and draining may have changed). False if it is not there any more or belongs to
        another incarnation: register again."""
        ...

    async def deregister(self, spec: WorkerSpec) -> None: ...

    async def workers(self, model: str) -> list[WorkerSpec]: ...

    async def all_workers(self) -> list[WorkerSpec]: ...


@dataclass(frozen=True, slots=True)
class Lease:
    model: str
    holder: str
    epoch: int


class Leases(Protocol):
    """One leader per model."""

    async def acquire(self, model: str, holder: str, *, ttl_s: float, epoch_at_least: int) -> Lease | None:
        """The lease with a fresh epoch: max(last epoch in the store + 1, epoch_at_least). None if another holds it."""
        ...

    async def renew(self, lease: Lease, *, ttl_s: float) -> bool:
        """False when it is not ours any more."""
        ...

    async def release(self, lease: Lease) -> None: ...


#: What ``lookup`` returns of each prompt, or what it raises.
Found = Sequence[Depths] | TandemError


class PrefixIndex(Protocol):
    """Which worker's prefix cache holds which sequence hash, for one model.

    What a worker publishes is prefix-closed (core/prefix_index.py sees to it), so depth is found by bisection.
    """

    async def lookup(self, model: str, hashes: bytes) -> Depths:
        """slot -> number of leading blocks of ``hashes`` (little-endian u64 sequence hashes) that it holds; slots with
        none are absent, and so are masked slots. One round trip."""
        ...

    def ask(self, model: str, prompts: Sequence[bytes], tell: Callable[[Found], None]) -> None:
        """``lookup`` of each in one round trip, for a callback: a task that waits for it costs more than the look-ups.
        ``tell`` is called once, later, never from in here."""
        ...

    async def update(self, spec: WorkerSpec, *, add: Sequence[int], remove: Sequence[int]) -> bool:
        """Sets and clears this worker's bits, removals first. False when its slot is leased to another incarnation now:
        register again and announce everything."""
        ...

    async def drop(self, spec: WorkerSpec) -> None:
        """Clears every bit of this worker's slot: masked at once, all gone when it returns. Until then the worker
        must not update. StoreUnavailable on the way leaves it masked: drop again, or register again."""
        ...

    async def size(self, model: str) -> int:
        """Blocks indexed."""
        ...


class Counters(Protocol):
    """Numbers that outlive a leader, such as tenants' service counters."""

    async def load(self, name: str) -> Mapping[str, float]: ...

    async def save(self, name: str, values: Mapping[str, float]) -> None: ...
