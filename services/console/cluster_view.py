"""What routers say about the cluster, asked again and again: leaders, workers, bookings, queue and policy.

Of several routers the leader of a model is believed about it. A router that does not answer is shown as such; the last
answer stays, with its age.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from services.console.watch import ASK_S, SELDOM_S, Watch
from tandem.adapters.grpc_server import open_channel
from tandem.v1 import bus_pb2, router_pb2, router_pb2_grpc, types_pb2

log = logging.getLogger(__name__)

_CALL_S = 2.0
#: While nobody looks.
_ALL_EVERY = 2
#: A leader that has said nothing for so long, the longest pause included, is believed no longer.
_SILENT_S = SELDOM_S + ASK_S + _CALL_S
#: The policy changes with SIGHUP only.
_POLICY_EVERY = 10

_Question = Callable[[str, router_pb2_grpc.RouterServiceStub], Awaitable[None]]


@dataclass(slots=True)
class ModelView:
    """One model as the router that knows it best sees it."""

    leader: str = ""
    epoch: int = 0
    by_leader: bool = False
    workers: list[router_pb2.WorkerState] = field(default_factory=list)
    accounting: router_pb2.GetAccountingResponse = field(default_factory=router_pb2.GetAccountingResponse)
    policy: dict[str, Any] = field(default_factory=dict)
    heard_at: float = 0.0
    #: The router that said so.
    router: str = ""


class ClusterView:
    """Asks with a pause of the ``watch`` between. While nobody looks only the queues, and all every second time."""

    def __init__(
        self,
        models: Sequence[str],
        routers: Sequence[str],
        now: Callable[[], float],
        watch: Watch,
    ) -> None:
        self.models = {model: ModelView() for model in models}
        self._routers = {address: open_channel(address) for address in routers}
        self.answering: dict[str, bool] = dict.fromkeys(routers, False)
        self._now = now
        self._watch = watch
        self._round = 0

    async def run(self) -> None:
        while True:
            if self._watch.on or self._round % _ALL_EVERY == 0:
                await self.look()
            else:
                await self.look_at_queues()
            self._round += 1
            await self._watch.pause()

    async def look(self) -> None:
        await self._each(self._all, self._routers)

    async def look_at_queues(self) -> None:
        """Leaders only are asked, and whether others answer stays what it was."""
        await self._each(self._queues, {view.router for view in self.models.values() if view.router})

    async def close(self) -> None:
        for channel in self._routers.values():
            await channel.close(None)

    @property
    def queued(self) -> int:
        return sum(view.accounting.queued for view in self.models.values())

    @property
    def in_flight(self) -> int:
        return sum(view.accounting.in_flight for view in self.models.values())

    async def _each(self, ask: _Question, routers: Iterable[str]) -> None:
        await asyncio.gather(*(self._ask(address, ask) for address in routers))

    async def _ask(self, address: str, ask: _Question) -> None:
        try:
            await ask(address, router_pb2_grpc.RouterServiceStub(self._routers[address]))
        except grpc.aio.AioRpcError as error:
            if self.answering[address]:
                log.warning("router %s does not answer: %s", address, error.code().name)
            self.answering[address] = False
        else:
            self.answering[address] = True

    async def _all(self, address: str, stub: router_pb2_grpc.RouterServiceStub) -> None:
        leaders = await stub.GetLeaders(router_pb2.GetLeadersRequest(), timeout=_CALL_S)
        for leader in leaders.leaders:
            view = self.models.get(leader.model)
            if view is not None and self._believed(leader, view):
                await self._look(address, stub, leader, view)

    def _believed(self, leader: router_pb2.Leader, view: ModelView) -> bool:
        return leader.self or not view.by_leader or self._now() - view.heard_at > _SILENT_S

    async def _queues(self, address: str, stub: router_pb2_grpc.RouterServiceStub) -> None:
        for model, view in self.models.items():
            if view.router == address:
                view.accounting = await self._accounting(stub, model)
                view.heard_at = self._now()

    async def _accounting(
        self, stub: router_pb2_grpc.RouterServiceStub, model: str
    ) -> router_pb2.GetAccountingResponse:
        request = router_pb2.GetAccountingRequest(model=model)
        answer: router_pb2.GetAccountingResponse = await stub.GetAccounting(request, timeout=_CALL_S)
        return answer

    async def _look(
        self, address: str, stub: router_pb2_grpc.RouterServiceStub, leader: router_pb2.Leader, view: ModelView
    ) -> None:
        model = leader.model
        workers = await stub.ListWorkers(router_pb2.ListWorkersRequest(model=model), timeout=_CALL_S)
        accounting = await self._accounting(stub, model)
        if not view.policy or self._round % _POLICY_EVERY == 0:
            policy = await stub.GetPolicy(router_pb2.GetPolicyRequest(model=model), timeout=_CALL_S)
            view.policy = json.loads(policy.policy_json)
        if not self._believed(leader, view):  # the leader has answered meanwhile
            return
        view.accounting, view.router = accounting, address
        view.workers = list(workers.workers)
        view.leader, view.epoch, view.by_leader = leader.router, leader.epoch, leader.self
        view.heard_at = self._now()

    def as_data(self) -> dict[str, Any]:
        """For the page and for `tandem status` and `tandem top`."""
        now = self._now()
        return {
            "routers": [{"address": address, "answers": ok} for address, ok in self.answering.items()],
            "models": [
                {
                    "model": model,
                    "leader": view.leader,
                    "epoch": view.epoch,
                    "age_s": round(now - view.heard_at, 1) if view.heard_at else None,
                    "queue": _queue(view.accounting),
                    "in_flight": view.accounting.in_flight,
                    "policy": view.policy,
                    "workers": workers_data(view.workers, view.accounting),
                }
                for model, view in self.models.items()
            ],
        }


def workers_data(
    workers: Sequence[router_pb2.WorkerState], accounting: router_pb2.GetAccountingResponse
) -> list[dict[str, Any]]:
    booked = {worker.worker: worker for worker in accounting.workers}
    return [_worker(worker, booked.get(worker.info.ref.id)) for worker in workers]


def _worker(state: router_pb2.WorkerState, booked: router_pb2.Booked | None) -> dict[str, Any]:
    info, load = state.info, state.load
    booked = booked or router_pb2.Booked()
    return {
        "id": info.ref.id,
        "role": _role(load, info),
        "pool": info.pool,
        "state": state.liveness,
        "silent_s": round(state.silent_s, 2),
        "engine": info.engine,
        "engine_version": info.engine_version,
        "address": info.ref.grpc_address,
        "running": load.running_requests,
        "waiting": load.waiting_requests,
        "pending_prefill_tokens": load.pending_prefill_tokens,
        "kv_blocks_used": load.kv_blocks_used,
        "kv_blocks_total": info.kv_blocks_total,
        "handoffs": load.open_handoffs,
        "index_complete": load.index_complete,
        "booked_requests": booked.in_flight,
        "booked_prefill_s": booked.pending_prefill_s,
        "booked_kv_blocks": booked.kv_blocks_in_use,
        "model_error": booked.model_error,
    }


def _role(load: bus_pb2.LoadReport, info: bus_pb2.WorkerInfo) -> str:
    return types_pb2.Role.Name(load.role or info.role).removeprefix("ROLE_").lower()


def _queue(accounting: router_pb2.GetAccountingResponse) -> dict[str, Any]:
    return {
        "requests": accounting.queued,
        "tokens": accounting.queued_tokens,
        "oldest_wait_s": accounting.oldest_wait_s,
        "by_class": [_depth(depth) for depth in accounting.queue_by_class],
        "by_tenant": [_depth(depth) for depth in accounting.queue_by_tenant],
    }


def _depth(depth: router_pb2.QueueDepth) -> dict[str, Any]:
    return {"name": depth.name, "requests": depth.requests, "tokens": depth.tokens}
