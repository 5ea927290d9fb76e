"""A frontend that is told to leave: what was open ends in peace, who comes hears why."""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from collections.abc import AsyncIterator

import grpc
import httpx
import openai
import pytest

from examples.grpc_client import TandemClient
from services.frontend.app import LAME_DUCK_S
from tandem import errors
from tandem.adapters.grpc_errors import error_of
from tandem.adapters.grpc_server import GrpcServer
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tests.integration.frontend.conftest import MODEL, Site, StartSite

HELLO = [{"role": "user", "content": "hi"}]


def in_haste(site: Site) -> asyncio.Task[None]:
    """Told to leave with too little time to see clients off."""
    site.frontend.leave(5.0)
    return asyncio.create_task(site.frontend.stop())


async def test_grpc_clients_are_served_until_they_have_been_told_to_go_elsewhere(start_site: StartSite) -> None:
    """Callers without pause over one connection: none is refused, and all are somewhere else before it ends."""
    async with start_site(drain_timeout_s=60.0) as site:
        port = site.frontend.grpc_port
        site.cluster.step_s = 0.05
        site.answer("slowly but surely to the end, for longer than it takes to tell everybody" * 5)
        async with TandemClient(f"127.0.0.1:{port}") as client:
            open_call = client.generate(MODEL, "abc", temperature=0.0)
            await anext(open_call)
            stopping = asyncio.create_task(site.frontend.stop())
            await site.until(lambda: not site.frontend.readiness()["ready"])
            async with successor(port) as took:
                while not took.calls and not stopping.done():
                    async for _ in client.generate(MODEL, "abc", temperature=0.0, max_tokens=1):
                        pass
            assert took.calls, "it was never told"
            async for _ in open_call:
                pass
            await stopping


class Successor(inference_pb2_grpc.InferenceServiceServicer):
    """Whoever comes in its place."""

    calls = 0

    async def Generate(self, request: object, context: object):  # type: ignore[no-untyped-def]
        self.calls += 1
        yield inference_pb2.GenerateResponse()


@contextlib.asynccontextmanager
async def successor(port: int) -> AsyncIterator[Successor]:
    """On the same port, while the other is still there."""
    server, servicer = GrpcServer("127.0.0.1", port), Successor()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.server)
    await server.start()
    try:
        yield servicer
    finally:
        await server.stop(0.0)


async def test_its_http_port_is_free_at_once(start_site: StartSite) -> None:
    async with start_site(drain_timeout_s=60.0) as site:
        port = site.frontend.http_port
        site.answer("on and on " * 40)
        site.cluster.step_s = 0.02
        stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        free = asyncio.Event()

        async def vacated() -> None:
            free.set()

        stopping = asyncio.create_task(site.frontend.stop(vacated))
        async with asyncio.timeout(30.0):
            await free.wait()
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
        server.close()
        assert not stopping.done()
        said = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        await stopping
    assert "".join(said) == "on and on " * 40


async def test_calls_that_come_when_there_is_no_time_are_refused_as_unavailable(site: Site) -> None:
    site.answer("slowly but surely to the end")
    site.cluster.step_s = 0.05
    async with TandemClient(f"127.0.0.1:{site.frontend.grpc_port}") as client:
        open_call = client.generate(MODEL, "abc", temperature=0.0)
        first = await anext(open_call)
        stopping = in_haste(site)
        await asyncio.sleep(2 * LAME_DUCK_S)
        with pytest.raises(errors.Leaving) as refused:
            await anext(client.generate(MODEL, "abc", temperature=0.0))
        rest = "".join([response.text async for response in open_call])
        await stopping
    assert refused.value.retryable
    assert first.text + rest == "slowly but surely to the end"


async def test_embeddings_over_grpc_end_in_peace_and_new_ones_are_refused(start_site: StartSite) -> None:
    wanted = inference_pb2.EmbedRequest(model=MODEL, inputs=[inference_pb2.EmbedInput(text="abc")])
    async with (
        start_site(model={"task": "embed"}) as site,
        grpc.aio.insecure_channel(f"127.0.0.1:{site.frontend.grpc_port}") as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Embed(wanted, timeout=30.0)
        await site.until(lambda: site.cluster.running)
        stopping = in_haste(site)
        await asyncio.sleep(2 * LAME_DUCK_S)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Embed(wanted, timeout=10.0)
        await asyncio.sleep(4 * LAME_DUCK_S)
        assert not stopping.done(), "it left with an answer open"
        site.cluster.embed_running(array("f", [1.0, 2.0]).tobytes())
        assert list((await call).embeddings[0].values) == [1.0, 2.0]
        await stopping
    assert isinstance(error_of(refused.value), errors.Leaving)


async def test_requests_on_open_connections_are_answered_and_their_connections_closed(site: Site) -> None:
    body = {"model": MODEL, "messages": HELLO}
    site.answer("x")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.frontend.http_port}") as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        stopping = asyncio.create_task(site.frontend.stop())
        await site.until(lambda: not site.frontend.readiness()["ready"])
        response = await client.post("/v1/chat/completions", json=body)
        await stopping
        with pytest.raises(httpx.ConnectError):
            await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200


async def test_told_again_it_leaves_sooner(start_site: StartSite) -> None:
    async with start_site(drain_timeout_s=60.0) as site:
        site.answer("on and on " * 400)
        site.cluster.step_s = 0.05
        stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        stopping = asyncio.create_task(site.frontend.stop())
        await asyncio.sleep(0.1)
        began = time.monotonic()
        site.frontend.leave(0.3)
        site.frontend.leave(30.0)
        with pytest.raises(openai.APIError, match="is leaving"):
            async for _ in stream:
                pass
        await stopping
        assert time.monotonic() - began < 15.0
