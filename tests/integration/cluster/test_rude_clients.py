"""Clients that read slowly or never, connect and say nothing, or never stop talking: the others notice nothing."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil
import pytest

from tests.harness.answers import MODEL
from tests.harness.client import describe
from tests.harness.cluster import wait_for
from tests.harness.site import Site
from tests.integration.cluster.conftest import _running as _running_cluster

MAX_LEN = 40_000
#: The deployment's; usually 30 s.
TIMEOUT_S = 3.0
#: What a frontend may take for all of a case's rudeness.
ROOM = 64 << 20
MB = 1_000_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    engine = {"step_s": 0.001, "token_range": [1000, 2000], "max_num_seqs": 128, "kv_blocks": 60_000}
    pools = [{"role": "aggregated", "engine": "sim", "engine_args": engine}]
    models = [{"name": MODEL, "path": MODEL, "max_model_len": MAX_LEN, "pools": pools}]
    limits = {"header_timeout_s": TIMEOUT_S, "write_timeout_s": TIMEOUT_S}
    yield from _running_cluster(tmp_path_factory.mktemp("rude"), {"models": models, "limits": limits})


@pytest.fixture
def others(site: Site) -> Iterator[None]:
    """Ordinary clients are served before, and after; memory stays within its room, and nothing is left behind."""
    with openai.OpenAI(base_url=site.url + "/v1", api_key="x", max_retries=0, timeout=30) as client:
        for _ in range(5):
            client.completions.create(model=MODEL, prompt="hello", max_tokens=5)
        before = _memory(site)
        yield
        assert client.completions.create(model=MODEL, prompt="hello", max_tokens=5).usage.completion_tokens == 5  # type: ignore[union-attr]
    assert _memory(site) - before < ROOM
    wait_for(lambda: not _running(site), 60, "nothing runs any more")


def _memory(site: Site) -> int:
    return int(psutil.Process(site.processes("frontend")[0]["pid"]).memory_info().rss)


def _running(site: Site) -> int:
    return int(describe(site.processes("decode")[0]["grpc"]).load.running_requests)


def _answers(site: Site) -> float:
    """Seconds that an ordinary client waits."""
    began = time.monotonic()
    with openai.OpenAI(base_url=site.url + "/v1", api_key="x", max_retries=0, timeout=30) as client:
        client.completions.create(model=MODEL, prompt="hello", max_tokens=5)
    return time.monotonic() - began


def _connect(site: Site, receive_buffer: int = 0) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", site.http_port))
    return connection


def _request(max_tokens: int) -> bytes:
    wanted: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": max_tokens, "stream": True}
    body = json.dumps({**wanted, "ignore_eos": True}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def _rest(connection: socket.socket) -> bytes:
    found = b""
    while b"[DONE]" not in found:
        piece = connection.recv(1 << 16)
        if not piece:
            break
        found += piece
    return found


def test_a_reader_of_one_kilobyte_a_second_gets_all_of_it(site: Site, others: None) -> None:
    tokens = 2_000
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(_connect(site, 4_096)) for _ in range(8)]
        for connection in slow:
            connection.sendall(_request(tokens))
        got = [b""] * len(slow)
        for _ in range(6):
            time.sleep(1)
            got = [all_ + connection.recv(1_000) for all_, connection in zip(got, slow, strict=True)]
            assert _answers(site) < 5
        # All at once: a kernel whose small buffer was full for long sends again ever more rarely, each time it is full.
        with ThreadPoolExecutor(len(slow)) as readers:
            rests = list(readers.map(_rest, slow))
        for all_, rest in zip(got, rests, strict=True):
            assert (all_ + rest).count(b'"text":') == tokens + 1  # the last says why it ends


def test_readers_that_never_read_are_cut_off(site: Site, others: None) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(_connect(site, 4_096)).sendall(_request(MAX_LEN - 10))
        wait_for(lambda: _running(site) > 0, 20, "their requests run")
        assert _answers(site) < 5
        # Their answers are far longer than what sockets hold: given up, not computed to the end.
        wait_for(lambda: _running(site) == 0, 60, "their requests are given up")


def test_two_thousand_idle_connections(site: Site, others: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8_192), hard))
    frontend = psutil.Process(site.processes("frontend")[0]["pid"])
    files = frontend.num_fds()
    try:
        with contextlib.ExitStack() as stack:
            for number in range(2_000):
                connection = stack.enter_context(_connect(site))
                if number % 2:
                    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-half: ")
            assert _answers(site) < 5
            wait_for(lambda: frontend.num_fds() < files + 100, 60, "connections that say nothing are closed")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_megabytes(site: Site, others: None, chunked: bool) -> None:
    length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % (100 * MB)
    piece = b"x" * MB
    if chunked:
        piece = b"%x\r\n" % MB + piece + b"\r\n"
    with _connect(site) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # refused before it has said all
            for _ in range(100):
                connection.sendall(piece)
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(4_096)
            assert answer.startswith(b"HTTP/1.1 413 ") and b"payload_too_large" in answer


def test_headers_that_never_end(site: Site, others: None) -> None:
    sent = 0
    with _connect(site) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
        with contextlib.suppress(ConnectionError):
            while sent < 50 * MB:
                connection.sendall(b"x-more: " + b"y" * 8_000 + b"\r\n")
                sent += 8_000
        assert sent < 20 * MB, "it went on reading"
        with contextlib.suppress(ConnectionError):
            assert connection.recv(4_096).startswith(b"HTTP/1.1 431 ")


def test_headers_that_come_one_by_one(site: Site, others: None) -> None:
    """Each is soon enough; all of them together take longer than a request's headers may."""
    with _connect(site) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        for _ in range(20):
            connection.sendall(b"x-more: y\r\n")
            time.sleep(TIMEOUT_S / 6)
