"""WorkerService: control of one worker by routers, peers and operators."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import grpc

from tandem.core.types import Role
from tandem.engine.protocol import Engine
from tandem.errors import InvalidRequest
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import codec
from tandem.worker.announcer import Announcer
from tandem.worker.execution import Execution
from tandem.worker.handoffs import OpenHandoffs
from tandem.worker.reporter import Reporter

log = logging.getLogger(__name__)


class WorkerControl(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(
        self,
        *,
        engine: Engine,
        announcer: Announcer,
        execution: Execution,
        handoffs: OpenHandoffs,
        reporter: Reporter,
        drain: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._announcer = announcer
        self._execution = execution
        self._handoffs = handoffs
        self._reporter = reporter
        self._drain = drain

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DescribeResponse:
        return worker_pb2.DescribeResponse(info=codec.spec_to_wire(self._announcer.spec), load=self._reporter.report())

    async def Fence(
        self, request: worker_pb2.FenceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.FenceResponse:
        self._execution.epoch = max(self._execution.epoch, request.epoch)
        return worker_pb2.FenceResponse(highest_epoch=self._execution.epoch)

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.DrainResponse:
        self._drain()
        return worker_pb2.DrainResponse()

    async def SetRole(
        self, request: worker_pb2.SetRoleRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.SetRoleResponse:
        try:
            role = codec.role_from_wire(request.role)
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        previous = self._announcer.spec.role
        if role is Role.PREFILL and not self._announcer.spec.kv_endpoint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "this worker has no KV transfer: it cannot prefill for others"
            )
        await self._announcer.change(role=role)
        log.info("role changed from %s to %s", previous.value, role.value)
        return worker_pb2.SetRoleResponse(previous=codec.role_to_wire(previous))

    async def Abort(
        self, request: worker_pb2.AbortRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.AbortResponse:
        return worker_pb2.AbortResponse(aborted=self._execution.abort(request.id, request.max_attempt))

    async def Flush(
        self, request: worker_pb2.FlushRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.FlushResponse:
        await self._engine.reset_prefix_cache()
        return worker_pb2.FlushResponse()

    async def ClaimHandoff(
        self, request: worker_pb2.ClaimHandoffRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ClaimHandoffResponse:
        left = self._handoffs.claim(request.handoff_id, request.engine_id, request.decode_worker)
        return worker_pb2.ClaimHandoffResponse(granted=left is not None, lease_left_s=left or 0.0)

    async def ReleaseHandoff(
        self, request: worker_pb2.ReleaseHandoffRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ReleaseHandoffResponse:
        self._handoffs.release(request.handoff_id, pulled=request.pulled)
        return worker_pb2.ReleaseHandoffResponse()
