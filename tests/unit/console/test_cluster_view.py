"""Whom the console believes about a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from services.console.cluster_view import ClusterView
from services.console.watch import SELDOM_S, Watch
from tandem.v1 import router_pb2, router_pb2_grpc

MODEL = "m"


class Router(router_pb2_grpc.RouterServiceServicer):
    """Leads or stands by, answers after ``late_s``, and knows of ``queued`` requests."""

    def __init__(self, *, leads: bool, late_s: float, queued: int) -> None:
        self._leads, self._late_s, self._queued = leads, late_s, queued

    async def GetLeaders(self, request: object, context: object) -> router_pb2.GetLeadersResponse:
        leader = router_pb2.Leader(model=MODEL, router="leader", epoch=1, self=self._leads)
        return router_pb2.GetLeadersResponse(leaders=[leader])

    async def ListWorkers(self, request: object, context: object) -> router_pb2.ListWorkersResponse:
        await asyncio.sleep(self._late_s)
        return router_pb2.ListWorkersResponse()

    async def GetAccounting(self, request: object, context: object) -> router_pb2.GetAccountingResponse:
        return router_pb2.GetAccountingResponse(queued=self._queued)

    async def GetPolicy(self, request: object, context: object) -> router_pb2.GetPolicyResponse:
        return router_pb2.GetPolicyResponse(policy_json="{}")


@asynccontextmanager
async def serving(router: Router) -> AsyncIterator[str]:
    server = grpc.aio.server()
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_a_leader_that_answers_is_believed_however_seldom_it_is_asked() -> None:
    now = 100.0
    async with AsyncExitStack() as stack:
        leader = await stack.enter_async_context(serving(Router(leads=True, late_s=0.0, queued=7)))
        standby = await stack.enter_async_context(serving(Router(leads=False, late_s=0.1, queued=0)))
        view = ClusterView([MODEL], [leader, standby], lambda: now, Watch(lambda: 0, lambda: now))
        stack.push_async_callback(view.close)
        for _ in range(3):
            await view.look()
            now += SELDOM_S
        assert (view.queued, view.models[MODEL].router) == (7, leader)


async def test_a_router_that_is_gone_stays_gone_while_only_queues_are_asked() -> None:
    async with AsyncExitStack() as stack:
        leader = await stack.enter_async_context(serving(Router(leads=True, late_s=0.0, queued=7)))
        async with serving(Router(leads=False, late_s=0.0, queued=0)) as standby:
            view = ClusterView([MODEL], [leader, standby], lambda: 100.0, Watch(lambda: 0, lambda: 100.0))
            stack.push_async_callback(view.close)
            await view.look()
            assert view.answering == {leader: True, standby: True}
        await view.look()
        await view.look_at_queues()
        assert view.answering == {leader: True, standby: False}
        assert view.queued == 7
