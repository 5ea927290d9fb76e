"""The registry, leases, prefix index and counters in Redis (or Valkey). The scripts in ``lua/`` do the work.

Layout of the prefix index (one per model): hashes ``...:p<2 bytes>``, field = the other 6 bytes of the sequence hash,
value = bitmap of worker slots. A slot is leased to (worker, incarnation). When its owner is gone it is masked out of
every lookup at once, and swept in the background before anybody gets it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tandem.adapters.redis_client import RedisClient, Script, connect
from tandem.adapters.store import MAX_SLOTS, SHARED_BY_A_MODEL, Found, Lease
from tandem.core.holders import Depths
from tandem.core.types import WorkerSpec
from tandem.errors import IncompatibleWorker, StoreUnavailable, TandemError
from tandem.v1 import bus_pb2
from tandem.wire.codec import spec_from_wire, spec_to_wire
from tandem.wire.subjects import encode

__all__ = ["RedisCounters", "RedisLeases", "RedisPrefixIndex", "RedisRegistry", "connect"]

log = logging.getLogger(__name__)

#: Blocks in one call of the update script, so that no lookup waits long behind it.
_UPDATE_BLOCKS = 128
#: Buckets and fields that one step of a sweep looks at.
_SWEEP_BUDGET = 1000
#: A background sweep takes at most about this share of the server.
_SWEEP_SHARE = 0.2
_ALL_BUCKETS = 65536

_REGISTER = Script("keys", "bits", "register")
_REFRESH = Script("keys", "refresh")
_DEREGISTER = Script("keys", "bits", "deregister")
_WORKERS = Script("keys", "workers")
_ACQUIRE = Script("keys", "lease_acquire")
_RENEW = Script("keys", "lease_renew")
_LOOKUP = Script("keys", "index_lookup")
_UPDATE = Script("keys", "bits", "index_update")
_DROP = Script("keys", "bits", "index_drop")
_SWEEP = Script("keys", "bits", "index_sweep")
_SIZE = Script("keys", "index_size")
_SAVE = Script("counters_save")


def root_key(cluster: str) -> str:
    """Prefix of every key of a cluster, and its hash tag, so that all of them live on one node of a Redis cluster."""
    return f"tandem:{{{encode(cluster)}}}"


def counters_key(cluster: str, name: str) -> str:
    return f"{root_key(cluster)}:counters:{encode(name)}"


def _owner(spec: WorkerSpec) -> str:
    return f"{encode(spec.id)} {spec.address.incarnation}"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


class RedisRegistry:
    """See ``tandem.adapters.store.Registry``."""

    def __init__(self, redis: RedisClient, cluster: str, *, max_slots: int = MAX_SLOTS) -> None:
        self._redis = redis
        self._keys = [root_key(cluster)]
        self._max_slots = max_slots
        self._read: dict[bytes, WorkerSpec] = {}  # by what stands in the store; mostly nothing has changed since
        self._index = RedisPrefixIndex(redis, cluster)

    async def register(self, spec: WorkerSpec, *, ttl_s: float) -> WorkerSpec:
        shared = [str(part) for name in SHARED_BY_A_MODEL for part in (name, getattr(spec, name))]
        answer = await self._redis.run(
            _REGISTER,
            self._keys,
            encode(spec.model),
            encode(spec.id),
            str(spec.address.incarnation),
            _milliseconds(ttl_s),
            self._max_slots,
            _info(spec),
            spec.wire_version,
            *shared,
        )
        verdict, *rest = answer
        if verdict == b"incompatible":
            name, theirs, ours, other = (part.decode() for part in rest)
            raise IncompatibleWorker(
                f"worker {spec.id} has {name} {ours}, but the workers of {spec.model} (such as {other}) have {theirs}",
                param=name,
            )
        if rest[-1]:
            self._index.sweep_in_background(spec.model)
        if verdict == b"full":
            raise StoreUnavailable(f"all {self._max_slots} slots of {spec.model} are leased or being swept")
        return dataclasses.replace(spec, slot=int(rest[0]))

    async def refresh(self, spec: WorkerSpec, *, ttl_s: float) -> bool:
        call = (
            encode(spec.model),
            encode(spec.id),
            str(spec.address.incarnation),
            spec.slot,
            _milliseconds(ttl_s),
            _info(spec),
        )
        return bool((await self._redis.run_piped(_REFRESH, self._keys, [call]))[0])

    async def deregister(self, spec: WorkerSpec) -> None:
        await self._redis.run(
            _DEREGISTER, self._keys, encode(spec.model), encode(spec.id), str(spec.address.incarnation), spec.slot
        )

    async def workers(self, model: str) -> list[WorkerSpec]:
        return await self._workers(encode(model))

    async def all_workers(self) -> list[WorkerSpec]:
        return await self._workers("")

    async def _workers(self, model: str) -> list[WorkerSpec]:
        (flat,) = await self._redis.run_piped(_WORKERS, self._keys, [(model,)])
        before, self._read = self._read, {}
        for slot, info in zip(flat[::2], flat[1::2], strict=True):
            entry = slot + b" " + info
            self._read[entry] = before.get(entry) or _spec(int(slot), info)
        return list(self._read.values())


def _spec(slot: int, info: bytes) -> WorkerSpec:
    return dataclasses.replace(spec_from_wire(bus_pb2.WorkerInfo.FromString(info)), slot=slot)


def _info(spec: WorkerSpec) -> bytes:
    return spec_to_wire(dataclasses.replace(spec, slot=0)).SerializeToString()


class RedisLeases:
    """See ``tandem.adapters.store.Leases``."""

    def __init__(self, redis: RedisClient, cluster: str) -> None:
        self._redis = redis
        self._keys = [root_key(cluster)]

    async def acquire(self, model: str, holder: str, *, ttl_s: float, epoch_at_least: int) -> Lease | None:
        epoch: bytes = await self._redis.run(
            _ACQUIRE, self._keys, encode(model), holder, _milliseconds(ttl_s), str(epoch_at_least)
        )
        return Lease(model, holder, int(epoch)) if epoch else None

    async def renew(self, lease: Lease, *, ttl_s: float) -> bool:
        return bool(await self._renew(lease, _milliseconds(ttl_s)))

    async def release(self, lease: Lease) -> None:
        await self._renew(lease, 0)

    async def _renew(self, lease: Lease, ttl_ms: int) -> Any:
        call = encode(lease.model), lease.holder, str(lease.epoch), ttl_ms
        return (await self._redis.run_piped(_RENEW, self._keys, [call]))[0]


class RedisPrefixIndex:
    """See ``tandem.adapters.store.PrefixIndex``."""

    def __init__(self, redis: RedisClient, cluster: str) -> None:
        self._redis = redis
        self._keys = [root_key(cluster)]
        self._sweeping: set[str] = set()

    async def lookup(self, model: str, hashes: bytes) -> Depths:
        return _depths((await self._redis.run_piped(_LOOKUP, self._keys, [(encode(model), hashes)]))[0])

    def ask(self, model: str, prompts: Sequence[bytes], tell: Callable[[Found], None]) -> None:
        def answered(replies: list[Any] | TandemError) -> None:
            tell(replies if isinstance(replies, TandemError) else [_depths(flat) for flat in replies])

        name = encode(model)
        self._redis.ask_piped(_LOOKUP, self._keys, [(name, hashes) for hashes in prompts], answered)

    async def update(self, spec: WorkerSpec, *, add: Sequence[int], remove: Sequence[int]) -> bool:
        """In calls of bounded length; prefix-closed after each of them if ``add`` names parents before children and
        ``remove`` children before parents."""
        model, owner = encode(spec.model), _owner(spec)
        batches: list[tuple[Sequence[int], Sequence[int]]]
        batches = [(remove[i : i + _UPDATE_BLOCKS], ()) for i in range(0, len(remove), _UPDATE_BLOCKS)]
        batches += [((), add[i : i + _UPDATE_BLOCKS]) for i in range(0, len(add), _UPDATE_BLOCKS)]
        for gone, new in batches or [((), ())]:
            call = model, owner, spec.slot, _packed(gone), _packed(new)
            if not (await self._redis.run_piped(_UPDATE, self._keys, [call]))[0]:
                return False
        return True

    async def drop(self, spec: WorkerSpec) -> None:
        model, owner = encode(spec.model), _owner(spec)
        cursor = 0
        while cursor < _ALL_BUCKETS:
            cursor = await self._redis.run(_DROP, self._keys, model, owner, spec.slot, cursor, _SWEEP_BUDGET)

    async def size(self, model: str) -> int:
        return int(await self._redis.run(_SIZE, self._keys, encode(model)))

    async def sweep(self, model: str) -> bool:
        """One bounded step of taking dead slots' bits out; whether there is more to do. Any process may take it."""
        return bool(await self._redis.run(_SWEEP, self._keys, encode(model), _SWEEP_BUDGET))

    def sweep_in_background(self, model: str) -> None:
        if model not in self._sweeping:
            self._sweeping.add(model)
            self._redis.spawn(self._sweep_all(model))

    async def _sweep_all(self, model: str) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                began = loop.time()
                if not await self.sweep(model):
                    return
                await asyncio.sleep((loop.time() - began) * (1 / _SWEEP_SHARE - 1))
        except StoreUnavailable as error:
            log.warning("sweep of the prefix index of %s put off to the next registration: %s", model, error)
        finally:
            self._sweeping.discard(model)


def _depths(flat: list[Any]) -> Depths:
    """From (depth, bitmap of slots) pairs, the deepest first."""
    return Depths([(depth, int.from_bytes(held, "little")) for depth, held in zip(flat[::2], flat[1::2], strict=True)])


def _packed(hashes: Sequence[int]) -> bytes:
    return array("Q", hashes).tobytes()


class RedisCounters:
    """See ``tandem.adapters.store.Counters``."""

    def __init__(self, redis: RedisClient, cluster: str) -> None:
        self._redis = redis
        self._cluster = cluster

    async def load(self, name: str) -> Mapping[str, float]:
        values: dict[bytes, bytes] = await self._redis.call("HGETALL", counters_key(self._cluster, name))
        return {field.decode(): float(value) for field, value in values.items()}

    async def save(self, name: str, values: Mapping[str, float]) -> None:
        flat = [part for field, value in values.items() for part in (field, repr(float(value)))]
        await self._redis.run_piped(_SAVE, [root_key(self._cluster), counters_key(self._cluster, name)], [flat])
