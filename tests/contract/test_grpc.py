"""Servers and channels as every service makes them, and the errors that cross them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem import errors
from tandem.adapters.grpc_errors import METADATA_KEY, STATUS, abort_with, error_of
from tandem.adapters.grpc_server import GrpcServer, open_channel
from tandem.v1 import worker_pb2, worker_pb2_grpc

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
CALL_S = 10.0
LONG_S = 60.0


class Worker(worker_pb2_grpc.WorkerServiceServicer):
    """Answers Abort with the error named by the request."""

    async def Abort(self, request: worker_pb2.AbortRequest, context: grpc.aio.ServicerContext) -> None:
        cls = errors.all_errors()[request.id]
        await abort_with(context, cls("because: ä", retry_after_s=1.5))

    async def Fence(
        self, request: worker_pb2.FenceRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.FenceResponse:
        return worker_pb2.FenceResponse(highest_epoch=len(request.router))

    async def Drain(self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext) -> None:
        raise ZeroDivisionError("a defect")

    async def Flush(self, request: worker_pb2.FlushRequest, context: grpc.aio.ServicerContext) -> None:
        await asyncio.sleep(LONG_S)


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    made = GrpcServer("127.0.0.1")
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Worker(), made.server)
    await made.start(SERVICE)
    yield made
    await made.stop(0)


@pytest.fixture
async def channel(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(f"127.0.0.1:{server.port}") as made:
        yield made


def test_every_error_has_a_status() -> None:
    assert set(STATUS) == set(errors.all_errors().values())


@pytest.mark.parametrize("code", sorted(errors.all_errors()))
async def test_an_error_arrives_as_the_same_class(channel: grpc.aio.Channel, code: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker_pb2_grpc.WorkerServiceStub(channel).Abort(worker_pb2.AbortRequest(id=code), timeout=CALL_S)
    cls = errors.all_errors()[code]
    assert caught.value.code() is STATUS[cls]
    assert caught.value.details() == "because: ä"
    assert METADATA_KEY in dict(caught.value.trailing_metadata())
    error = error_of(caught.value)
    assert type(error) is cls
    assert (error.message, error.retry_after_s) == ("because: ä", 1.5)


async def test_errors_of_grpc_itself(server: GrpcServer, channel: grpc.aio.Channel) -> None:
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Drain(worker_pb2.DrainRequest(), timeout=CALL_S)
    assert type(error_of(caught.value)) is errors.InternalError
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Flush(worker_pb2.FlushRequest(), timeout=0.05)
    assert type(error_of(caught.value)) is errors.RequestTimeout
    async with open_channel("127.0.0.1:1") as nowhere:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker_pb2_grpc.WorkerServiceStub(nowhere).Fence(worker_pb2.FenceRequest(), timeout=CALL_S)
    assert type(error_of(caught.value)) is errors.Lost


async def test_health_per_service_and_at_the_end(server: GrpcServer, channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    async def status(service: str) -> int:
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=CALL_S)
        return int(answer.status)

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert [await status(name) for name in ("", SERVICE)] == [serving, serving]
    await server.set_serving(False)
    assert [await status(name) for name in ("", SERVICE)] == [not_serving, not_serving]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await status("no.such.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_names_the_service(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request]), timeout=CALL_S):
        names = {service.name for service in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        return
    pytest.fail("no answer")


async def test_messages_of_megabytes_pass(channel: grpc.aio.Channel) -> None:
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    answer = await stub.Fence(worker_pb2.FenceRequest(router="x" * (16 << 20)), timeout=CALL_S)
    assert answer.highest_epoch == 16 << 20


async def test_a_taken_port_is_an_error_of_the_user(server: GrpcServer) -> None:
    with pytest.raises(errors.ConfigError, match=str(server.port)):
        GrpcServer("127.0.0.1", server.port)


async def test_a_channel_finds_the_restarted_server() -> None:
    first = GrpcServer("127.0.0.1")
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(Worker(), first.server)
    await first.start(SERVICE)
    async with open_channel(f"127.0.0.1:{first.port}") as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        await stub.Fence(worker_pb2.FenceRequest(), timeout=CALL_S)
        await first.stop(0)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Fence(worker_pb2.FenceRequest(), timeout=CALL_S)
        second = GrpcServer("127.0.0.1", first.port)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(Worker(), second.server)
        await second.start(SERVICE)
        await stub.Fence(worker_pb2.FenceRequest(), timeout=CALL_S, wait_for_ready=True)
        await second.stop(0)
