"""A frontend that is told to leave: what was open ends in peace, who comes hears why."""

from __future__ import annotations

import asyncio
import time

import httpx
import openai
import pytest

from examples.grpc_client import TandemClient
from tandem import errors
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
