"""RouterService: what operators, the console and the CLI may ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import grpc

from services.router.model_router import ModelRouter
from tandem.adapters.grpc_errors import abort_with
from tandem.core.snapshot import Depth
from tandem.core.types import Explanation, Request, RequestKey
from tandem.errors import UnknownModel
from tandem.v1 import router_pb2, router_pb2_grpc
from tandem.wire import codec


class RouterControl(router_pb2_grpc.RouterServiceServicer):
    def __init__(self, routers: Mapping[str, ModelRouter], instance: str, now: Callable[[], float]) -> None:
        self._routers = routers
        self._instance = instance
        self._now = now

    async def Explain(
        self, request: router_pb2.ExplainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> router_pb2.ExplainResponse:
        router = await self._router(request.model, context)
        asked = Request(
            key=RequestKey("explain"),
            model=request.model,
            isl_tokens=request.isl_tokens,
            max_osl_tokens=request.max_tokens or 256,
            arrival_s=self._now(),
            timeout_s=600.0,
            tenant=request.tenant or "default",
            request_class=request.request_class,
        )
        return _explanation(await router.explain(asked, request.block_hashes))

    async def ListWorkers(
        self, request: router_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> router_pb2.ListWorkersResponse:
        routers = [await self._router(request.model, context)] if request.model else list(self._routers.values())
        now = self._now()
        answer = router_pb2.ListWorkersResponse()
        for router in routers:
            for member in router.fleet.members.values():
                liveness = "suspect" if member.suspect else "draining" if member.spec.draining else "alive"
                state = answer.workers.add(
                    info=codec.spec_to_wire(member.spec), liveness=liveness, silent_s=now - member.heard_at
                )
                if member.report is not None:
                    state.load.CopyFrom(member.report)
        return answer

    async def GetPolicy(
        self, request: router_pb2.GetPolicyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> router_pb2.GetPolicyResponse:
        router = await self._router(request.model, context)
        scheduler = router.scheduler
        return router_pb2.GetPolicyResponse(
            policy_json=json.dumps(asdict(scheduler.policy), sort_keys=True),
            classes_json=json.dumps([asdict(each) for each in scheduler.classes.values()]),
            tenants_json=json.dumps([asdict(each) for each in scheduler.tenants.values()]),
        )

    async def GetLeaders(
        self, request: router_pb2.GetLeadersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> router_pb2.GetLeadersResponse:
        leaders = [
            router_pb2.Leader(
                model=router.model,
                router=router.leadership.leader,
                epoch=router.leadership.heard_epoch,
                self=bool(router.leadership.epoch),
            )
            for router in self._routers.values()
        ]
        return router_pb2.GetLeadersResponse(leaders=leaders)

    async def GetAccounting(
        self, request: router_pb2.GetAccountingRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> router_pb2.GetAccountingResponse:
        router = await self._router(request.model, context)
        snapshot = router.scheduler.snapshot(self._now())
        queue = snapshot.queue_by_class.values()
        return router_pb2.GetAccountingResponse(
            queued=sum(depth.requests for depth in queue),
            queued_tokens=sum(depth.tokens for depth in queue),
            oldest_wait_s=snapshot.oldest_wait_s,
            in_flight=snapshot.in_flight,
            kept=router.kept,
            service=router.scheduler.service_counters(),
            queue_by_class=_depths(snapshot.queue_by_class),
            queue_by_tenant=_depths(snapshot.queue_by_tenant),
            workers=[
                router_pb2.Booked(
                    worker=worker.id,
                    in_flight=worker.in_flight,
                    pending_prefill_s=worker.pending_prefill_s,
                    kv_blocks_in_use=worker.kv_blocks_in_use,
                    kv_blocks_total=worker.kv_blocks_total,
                    sequences=worker.sequences,
                    model_error=worker.model_error,
                )
                for worker in snapshot.workers
            ],
        )

    async def _router(self, model: str, context: grpc.aio.ServicerContext[Any, Any]) -> ModelRouter:
        router = self._routers.get(model)
        if router is None:
            names = ", ".join(self._routers)
            await abort_with(context, UnknownModel(f"no model {model!r}; this router has: {names}"))
        assert router is not None
        return router


def _depths(depths: Mapping[str, Depth]) -> list[router_pb2.QueueDepth]:
    return [router_pb2.QueueDepth(name=n, requests=d.requests, tokens=d.tokens) for n, d in depths.items()]


def _explanation(explanation: Explanation) -> router_pb2.ExplainResponse:
    answer = router_pb2.ExplainResponse(summary=explanation.summary)
    for candidate in explanation.candidates:
        answer.candidates.add(
            decode_worker=candidate.plan.decode_worker,
            prefill_worker=candidate.plan.prefill_worker or "",
            score=candidate.score,
            terms=[router_pb2.Term(name=name, value=value) for name, value in candidate.terms.items()],
            chosen=candidate.plan == explanation.chosen,
            excluded=candidate.excluded,
        )
    return answer
