"""Load of several tenants and classes on a simulated cluster whose capacity is small and known, and what each got.

A prompt of ``PROMPT`` tokens keeps a worker busy for ``PREFILL_S``; outputs are short. So a cluster of so many workers
serves about workers / PREFILL_S requests a second, and ten times that is no trouble to send.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from tandem.v1 import inference_pb2, inference_pb2_grpc, router_pb2, router_pb2_grpc
from tests.harness.answers import BLOCK, MODEL, VOCABULARY

PROMPT, OUTPUT = 256, 4
PREFILL_S = 0.2
#: A step of decodes takes next to nothing, so that prompts are what capacity is made of.
TERMS = {"p0": 0.0, "p1": PREFILL_S / PROMPT, "p2": 0.0, "p3": 0.0, "d0": 0.005, "d1": 0.0, "d2": 0.0}
TENANTS = ("ann", "bob")


def digest(tenant: str) -> str:
    return hashlib.sha256(f"key-{tenant}".encode()).hexdigest()


def deployment(*, decode: int = 2, routers: int = 1, tenants: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    args = {
        "profile": "generic",
        "terms": TERMS,
        "token_range": [VOCABULARY.start, VOCABULARY.stop],
        "max_batched_tokens": PROMPT,
        "max_num_seqs": 64,
    }
    named = tenants or [{"name": name, "api_key_sha256": [digest(name)]} for name in TENANTS]
    pools = [{"role": "decode", "replicas": decode, "engine": "sim", "engine_args": args}]
    return {
        "routers": routers,
        "models": [{"name": MODEL, "path": MODEL, "max_model_len": 2048, "block_size": BLOCK, "pools": pools}],
        "classes": [
            {"name": "top"},
            {"name": "batch", "rank": 1, "background": True, "min_share": 0.1},
        ],
        "tenants": list(named),
    }


@dataclass(eq=False)
class Asked:
    """One request and what became of it. Times are of this process's clock; 0 = not (yet)."""

    tenant: str
    request_class: str
    began_s: float
    first_s: float = 0.0
    ended_s: float = 0.0
    error: str = ""

    @property
    def complete(self) -> bool:
        return self.ended_s > 0 and not self.error


@dataclass(eq=False)
class Clients:
    """Of one frontend."""

    address: str
    seed: int = 0
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._channel = grpc.aio.insecure_channel(self.address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()
        await self._channel.close(None)

    def ask(self, tenant: str, request_class: str = "") -> Asked:
        asked = Asked(tenant, request_class, time.monotonic())
        self.asked.append(asked)
        task = asyncio.create_task(self._ask(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asked

    async def arrive(self, rate: float, seconds: float, tenant: str, request_class: str = "") -> None:
        """A request now and then, at random."""
        until = time.monotonic() + seconds
        while (wait := self._rng.expovariate(rate)) + time.monotonic() < until:
            await asyncio.sleep(wait)
            self.ask(tenant, request_class)

    async def _ask(self, asked: Asked) -> None:
        request = inference_pb2.GenerateRequest(
            model=MODEL,
            token_ids=inference_pb2.TokenIds(ids=self._rng.choices(range(300, 40_000), k=PROMPT)),
            options=inference_pb2.GenerateOptions(
                max_tokens=OUTPUT, temperature=0.0, ignore_eos=True, request_class=asked.request_class
            ),
        )
        metadata = [("authorization", f"Bearer key-{asked.tenant}")]
        try:
            async for _ in self._stub.Generate(request, timeout=300.0, metadata=metadata):
                asked.first_s = asked.first_s or time.monotonic()
        except grpc.aio.AioRpcError as error:
            asked.error = f"{error.code().name}: {error.details()}"
        asked.ended_s = time.monotonic()

    async def done(self, within_s: float) -> None:
        if self._tasks:
            _, hanging = await asyncio.wait(set(self._tasks), timeout=within_s)
            assert not hanging, f"{len(hanging)} of {len(self.asked)} requests hang"

    async def leave(self) -> None:
        """As clients do that lose patience."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def accounting(router: str) -> router_pb2.GetAccountingResponse:
    with grpc.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        return stub.GetAccounting(router_pb2.GetAccountingRequest(model=MODEL), timeout=5)  # type: ignore[no-any-return]


def engine_depths(router: str) -> list[int]:
    """Requests that wait in each engine, as its last load report says."""
    with grpc.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        workers = stub.ListWorkers(router_pb2.ListWorkersRequest(model=MODEL), timeout=5).workers
    return [worker.load.waiting_requests for worker in workers]
