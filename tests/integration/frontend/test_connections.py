"""Connections whose clients never come to an end: each is closed. Those whose clients do not wait for answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from services.frontend import connections, direct
from tandem.adapters.deployment import Limits
from tests.integration.frontend.conftest import KEY, MODEL, Site, StartSite

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
GENEROUS_S = 20.0


@contextlib.asynccontextmanager
async def connection(site: Site) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.frontend.http_port)
    with contextlib.closing(writer):
        async with asyncio.timeout(3 * GENEROUS_S):
            yield reader, writer


def head_and_body(*, expect: bool = False, max_tokens: int = 400, stream: bool = True) -> tuple[bytes, bytes]:
    """Of a completion. ``expect``: by ASGI, which requests that are in any way unusual take."""
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": max_tokens, "stream": stream}).encode()
    more = b"expect: 100-continue\r\n" if expect else b""
    return POST + more + b"content-length: %d\r\n\r\n" % len(body), body


async def closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, sending: bytes = b"") -> None:
    """Returns when the other side takes nothing any more."""
    async with asyncio.timeout(GENEROUS_S):
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(sending)
                await writer.drain()
                await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (POST + b"content-length: 10\r\n\r\na", b"504"),
        (POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-more: y", b"504"),
    ],
)
async def test_an_answer_before_the_requests_end_is_the_connections_last(
    site: Site, monkeypatch: pytest.MonkeyPatch, sent: bytes, status: bytes
) -> None:
    monkeypatch.setattr(direct, "BODY_TIMEOUT_S", 0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.frontend.http_port)
    with contextlib.closing(writer):
        writer.write(sent)
        async with asyncio.timeout(20):
            head, *lines = (await reader.read()).splitlines()  # to the end of the connection
    assert head.startswith(b"HTTP/1.1 " + status)
    assert b"connection: close" in lines


async def test_trailers_that_never_end(site: Site) -> None:
    sent = 0
    reader, writer = await asyncio.open_connection("127.0.0.1", site.frontend.http_port)
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        writer.write(POST + b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
        while sent < 50_000_000 and not reader.at_eof():
            writer.write(b"x-more: " + b"y" * 8_000 + b"\r\n")
            sent += 8_000
            async with asyncio.timeout(20):
                await writer.drain()
    assert sent < 20_000_000, "it went on reading"


@pytest.mark.parametrize("expect", [False, True])
async def test_a_body_that_goes_on_after_its_refusal_has_a_bound(
    site: Site, monkeypatch: pytest.MonkeyPatch, expect: bool
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.5)
    more = b"expect: 100-continue\r\n" if expect else b""
    async with connection(site) as (reader, writer):
        writer.write(POST + more + b"content-length: 1000000000\r\n\r\n")
        answer = await reader.read()  # all that it says
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"payload_too_large" in answer
        await closed(reader, writer, sending=b"x")


async def test_so_has_one_that_comes_fast(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 600.0)
    monkeypatch.setattr(connections, "LINGER_BYTES", 1 << 20)
    async with connection(site) as (reader, writer):
        writer.write(POST + b"content-length: 1000000000\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 413 ")
        await closed(reader, writer, sending=b"x" * 100_000)


async def test_a_refused_body_that_ends_soon_leaves_the_connection_as_it_was(start_site: StartSite) -> None:
    async with start_site(limits=Limits(max_body_bytes=1000)) as site, connection(site) as (reader, writer):
        for _ in range(3):
            writer.write(POST + b"content-length: 1001\r\n\r\n" + b"x" * 1001)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
            await reader.readuntil(b"}}")


@pytest.mark.parametrize("key", [b"", b"authorization: Bearer sk-wrong\r\n"])
@pytest.mark.parametrize("expect", [b"", b"expect: 100-continue\r\n"])
async def test_strangers_are_refused_before_they_have_sent_their_body(
    start_site: StartSite, monkeypatch: pytest.MonkeyPatch, key: bytes, expect: bytes
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.5)
    async with start_site(tenants=True) as site, connection(site) as (reader, writer):
        writer.write(POST + key + expect + b"content-length: 5000000\r\n\r\nx")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"authentication_error" in answer
        await closed(reader, writer, sending=b"x")


async def test_a_tenants_body_is_read(start_site: StartSite) -> None:
    head, body = head_and_body(stream=False)
    async with start_site(tenants=True) as site, connection(site) as (reader, writer):
        site.answer("x")
        writer.write(head.replace(b"host: x", b"host: x\r\nauthorization: Bearer " + KEY.encode()))
        await asyncio.sleep(0.2)
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")


async def test_half_a_request_behind_a_running_one_does_not_end_that(start_site: StartSite) -> None:
    """It has its time from when it is its turn."""
    async with start_site(limits=Limits(header_timeout_s=0.5)) as site, connection(site) as (reader, writer):
        site.answer("word " * 40)
        site.cluster.step_s = 0.02
        writer.write(b"".join(head_and_body()) + POST)
        answer = await reader.readuntil(b"data: [DONE]")
        assert answer.count(b'"text"') > 20
        await reader.read()  # to its end


async def test_empty_lines_after_an_answer_are_no_request(start_site: StartSite) -> None:
    async with start_site(limits=Limits(header_timeout_s=0.5)) as site, connection(site) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"}")
        writer.write(b"\r\n")
        async with asyncio.timeout(GENEROUS_S):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""


async def test_a_body_has_its_time_from_when_it_is_its_turn(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BODY_TIMEOUT_S", 2.0)
    site.answer("word " * 30)
    site.cluster.step_s = 0.1
    (head, body), (second, its_body) = head_and_body(), head_and_body(stream=False)
    async with connection(site) as (reader, writer):
        began = asyncio.get_running_loop().time()
        writer.write(head + body + second + its_body[:10])
        await reader.readuntil(b"\r\n0\r\n\r\n")
        assert asyncio.get_running_loop().time() - began > 2.0, "the first was over too soon for this to say anything"
        site.cluster.step_s = 0.001
        writer.write(its_body[10:])
        rest = await reader.readuntil(b"\r\n\r\n")
    assert b"HTTP/1.1 200 " in rest, rest


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True), (False, False)])
async def test_a_client_that_leaves_ends_what_it_asked_for_however_it_did(
    site: Site, first: bool, second: bool
) -> None:
    """``first``, ``second``: by ASGI, the one that runs, and the one that waits behind it."""
    site.answer("word " * 100)
    site.cluster.step_s = 0.2
    async with connection(site) as (reader, writer):
        writer.write(b"".join(head_and_body(expect=first)) + b"".join(head_and_body(expect=second)))
        await reader.readuntil(b'"text"')
        assert len(site.cluster.running) == 1
    await site.until(lambda: not site.cluster.running)
    assert site.cluster.aborts
    assert len(site.cluster.submits) == 1


async def test_many_requests_at_once_are_read_as_they_are_answered(site: Site) -> None:
    """A connection holds what one reading brought, not all that a client has to say."""
    one, sent = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 40_000
    most = 0
    async with connection(site) as (reader, writer):

        async def read() -> int:
            nonlocal most
            found = 0
            while found < sent:
                found += (await reader.readuntil(b"}")).count(b"}")
                for held in site.frontend._http.server_state.connections:
                    most = max(most, len(held.pipeline))
            return found

        reading = asyncio.create_task(read())
        for _ in range(sent // 1000):
            writer.write(one * 1000)
            await writer.drain()
        assert await reading == sent
    assert most < 16_000, "what waits has no bound"
