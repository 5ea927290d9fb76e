"""A prefill worker whose process has stopped: its ports take connections, and nothing is ever answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from tandem.adapters.grpc_server import GrpcServer
from tandem.v1 import bus_pb2, types_pb2, worker_pb2, worker_pb2_grpc

_LEASE_S = 30.0
_HANGS_S = 60.0


class HungProducer(worker_pb2_grpc.WorkerServiceServicer):
    """It stopped after it had granted ``grants`` claims."""

    def __init__(self, grants: int) -> None:
        self._grants = grants
        self._grpc_address = ""
        self._kv_port = 0
        self.pulls = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[HungProducer]:
        server = GrpcServer("127.0.0.1")
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, server.server)
        await server.start()
        kv = await asyncio.start_server(self._on_pull, "127.0.0.1", 0)
        self._grpc_address = f"127.0.0.1:{server.port}"
        self._kv_port = kv.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            kv.close()
            await server.stop(0.0)

    async def ClaimHandoff(
        self, request: worker_pb2.ClaimHandoffRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ClaimHandoffResponse:
        if self._grants == 0:
            await asyncio.sleep(_HANGS_S)
        self._grants -= 1
        return worker_pb2.ClaimHandoffResponse(granted=True, lease_left_s=_LEASE_S)

    async def ReleaseHandoff(
        self, request: worker_pb2.ReleaseHandoffRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.ReleaseHandoffResponse:
        await asyncio.sleep(_HANGS_S)
        return worker_pb2.ReleaseHandoffResponse()

    async def _on_pull(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pulls += 1
        await reader.read()  # until the other side gives up
        writer.close()

    def handoff(self, assignment: bus_pb2.Assignment, blocks: int) -> bus_pb2.WorkerMessage:
        submit = bus_pb2.Submit.FromString(assignment.submit)
        params = {"host": "127.0.0.1", "port": self._kv_port, "engine_id": "e", "handoff_id": "h",
                  "blocks": list(range(blocks))}  # fmt: skip
        kv = bus_pb2.KvHandoff(
            handoff_id="h", engine_id="e", num_tokens=submit.isl_tokens, params=json.dumps(params).encode()
        )
        ref = types_pb2.WorkerRef(id="hung", incarnation=1, grpc_address=self._grpc_address)
        return bus_pb2.WorkerMessage(handoff=bus_pb2.Handoff(assignment=assignment, prefill=ref, kv=kv))
