"""A frontend that is told to leave: what was open ends in peace, who comes hears why."""

from __future__ import annotations

import asyncio
import time
from array import array

import grpc
import httpx
import openai
import pytest

from examples.grpc_client import TandemClient
from services.frontend.app import LAME_DUCK_S
from tandem import errors
from tandem.adapters.grpc_errors import error_of
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tests.integration.frontend.conftest import MODEL, Site, StartSite

HELLO = [{"role": "user", "content": "hi"}]


async def test_calls_that_come_meanwhile_are_refused_as_unavailable(site: Site) -> None:
    site.answer("slowly but surely to the end")
    site.cluster.step_s = 0.02
    async with TandemClient(f"127.0.0.1:{site.frontend.grpc_port}") as client:
        open_call = client.generate(MODEL, "abc", temperature=0.0)
        first = await anext(open_call)
        stopping = asyncio.create_task(site.frontend.stop())
        await site.until(lambda: not site.frontend.readiness()["ready"])
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
        stopping = asyncio.create_task(site.frontend.stop())
        await site.until(lambda: not site.frontend.readiness()["ready"])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Embed(wanted, timeout=10.0)
        await asyncio.sleep(4 * LAME_DUCK_S)
        assert not stopping.done(), "it left with an answer open"
        site.cluster.embed_running(array("f", [1.0, 2.0]).tobytes())
        assert list((await call).embeddings[0].values) == [1.0, 2.0]
        await stopping
    assert isinstance(error_of(refused.value), errors.Leaving)


async def test_requests_on_open_connections_get_503_and_its_reason(site: Site) -> None:
    body = {"model": MODEL, "messages": HELLO}
    site.answer("x")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.frontend.http_port}") as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        stopping = asyncio.create_task(site.frontend.stop())
        await site.until(lambda: not site.frontend.readiness()["ready"])
        response = await client.post("/v1/chat/completions", json=body)
        await stopping
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "leaving")
    assert (error["type"], error["retryable"]) == ("service_unavailable_error", True)
    assert response.headers["retry-after"]


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
