"""Connections whose clients never come to an end: each is closed."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from services.frontend import direct
from tests.integration.frontend.conftest import Site

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


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
