"""What every bus does: the in-memory twin and the one over a real nats-server run the same tests."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nats
import pytest

from tandem.adapters.bus import Bus, Message
from tandem.adapters.embedded import NatsServer
from tandem.adapters.memory_bus import MemoryBus, MemoryHub, matches
from tandem.adapters.nats_bus import NatsBus, NatsOptions
from tandem.errors import BusUnavailable, ConfigError, NoWorkers, PayloadTooLarge, RequestTimeout
from tandem.v1 import bus_pb2

LONG_S = 20.0
MAX_PAYLOAD = 100_000


class MemoryWorld:
    def __init__(self) -> None:
        self.hub = MemoryHub(max_payload=MAX_PAYLOAD)
        self.buses: list[Bus] = []

    async def connect(self, **options: Any) -> Bus:
        self.buses.append(MemoryBus(self.hub, **options))
        return self.buses[-1]

    async def stop(self) -> None:
        self.hub.stop()

    async def start(self) -> None:
        self.hub.start()

    async def close(self) -> None:
        for bus in self.buses:
            await bus.close()


class NatsWorld:
    def __init__(self, server: Any = None) -> None:
        """``server``: one that is not embedded but runs elsewhere, such as in a container."""
        self.server = server or NatsServer(max_payload=MAX_PAYLOAD)
        self.buses: list[Bus] = []

    async def connect(self, **options: Any) -> Bus:
        self.buses.append(await NatsBus.connect(self.server.url, options=NatsOptions(**options)))
        return self.buses[-1]

    async def stop(self) -> None:
        self.server.kill()
        await until(lambda: not any(bus.connected for bus in self.buses))

    async def start(self) -> None:
        await self.server.start()

    async def close(self) -> None:
        for bus in self.buses:
            await bus.close()
        await self.server.close()


World = MemoryWorld | NatsWorld


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World = MemoryWorld() if request.param == "memory" else NatsWorld()
    if isinstance(made, NatsWorld):
        await made.server.start()
    try:
        yield made
    finally:
        await made.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LONG_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_messages_arrive_in_order_and_whole(world: World) -> None:
    sender, receiver = await world.connect(), await world.connect()
    got: list[Message] = []
    await receiver.subscribe("work.a", got.append)
    payloads = [b"", b"\r\n", b"MSG x 1 3\r\n"] + [bytes([i % 256]) * (i * 7) for i in range(3000)] + [b"z" * 100_000]
    for payload in payloads:
        sender.publish("work.a", payload, reply="back.here")
    await until(lambda: len(got) == len(payloads))
    assert [m.data for m in got] == payloads
    assert {(m.subject, m.reply, m.no_responders) for m in got} == {("work.a", "back.here", False)}


async def test_a_subscription_is_there_when_subscribe_returns(world: World) -> None:
    sender, receiver = await world.connect(), await world.connect()
    for i in range(50):
        got: list[Message] = []
        await receiver.subscribe(f"s.{i}", got.append)
        sender.publish(f"s.{i}", b"x")
        await until(lambda got=got: got)


async def test_wildcards_and_echo(world: World) -> None:
    bus = await world.connect()
    one: list[str] = []
    rest: list[str] = []
    await bus.subscribe("t.*.x", lambda m: one.append(m.subject))
    await bus.subscribe("t.>", lambda m: rest.append(m.subject))
    for subject in ("t.a.x", "t.a.y", "t.a.b.x", "t", "u.a.x", "t.c.x"):
        bus.publish(subject, b"")
    await until(lambda: len(rest) == 4)
    assert one == ["t.a.x", "t.c.x"]
    assert rest == ["t.a.x", "t.a.y", "t.a.b.x", "t.c.x"]


async def test_a_queue_group_shares_and_others_get_all(world: World) -> None:
    sender, a, b, c = [await world.connect() for _ in range(4)]
    seen: dict[str, list[bytes]] = {"a": [], "b": [], "c": []}
    await a.subscribe("q", lambda m: seen["a"].append(m.data), queue="g")
    await b.subscribe("q", lambda m: seen["b"].append(m.data), queue="g")
    await c.subscribe("q", lambda m: seen["c"].append(m.data))
    payloads = [str(i).encode() for i in range(100)]
    for payload in payloads:
        sender.publish("q", payload)
    await until(lambda: len(seen["a"]) + len(seen["b"]) == 100 and len(seen["c"]) == 100)
    assert sorted(seen["a"] + seen["b"]) == sorted(payloads)
    assert seen["a"]
    assert seen["b"]
    assert seen["c"] == payloads


async def test_nobody_listens_comes_back_to_the_publisher_only(world: World) -> None:
    sender, other = await world.connect(), await world.connect()
    mine: list[Message] = []
    theirs: list[Message] = []
    await sender.subscribe("bounces.me.*", mine.append)
    await other.subscribe("bounces.me.*", theirs.append)
    sender.publish("nobody.here", b"x", reply="bounces.me.w1")
    await until(lambda: mine)
    assert mine == [Message("bounces.me.w1", b"", "", no_responders=True)]
    sender.publish("bounces.me.w2", b"a message")
    await until(lambda: theirs)
    assert [m.subject for m in theirs] == ["bounces.me.w2"]


async def test_no_bounce_once_somebody_listens_and_again_after_unsubscribe(world: World) -> None:
    sender, receiver = await world.connect(), await world.connect()
    bounced: list[Message] = []
    got: list[Message] = []
    await sender.subscribe("back", bounced.append)
    subscription = await receiver.subscribe("work", got.append)
    sender.publish("work", b"1", reply="back")
    await until(lambda: got)
    await subscription.unsubscribe()
    await receiver.flush(timeout_s=LONG_S)
    sender.publish("work", b"2", reply="back")
    await until(lambda: bounced)
    assert [m.data for m in got] == [b"1"]
    assert len(bounced) == 1
    await subscription.unsubscribe()  # twice is once


async def test_request_and_reply(world: World) -> None:
    client, server = await world.connect(), await world.connect()
    await server.subscribe("double", lambda m: server.publish(m.reply, m.data * 2))
    answers = await asyncio.gather(*(client.request("double", b"%d" % i, timeout_s=LONG_S) for i in range(50)))
    assert answers == [b"%d" % i * 2 for i in range(50)]


async def test_request_that_nobody_takes_or_answers(world: World) -> None:
    client, server = await world.connect(), await world.connect()
    with pytest.raises(NoWorkers, match="silent"):
        await client.request("silent", b"", timeout_s=LONG_S)
    await server.subscribe("silent", lambda m: None)
    with pytest.raises(RequestTimeout, match="silent"):
        await client.request("silent", b"", timeout_s=0.05)


async def test_payload_over_the_limit_is_refused_and_the_bus_lives(world: World) -> None:
    bus = await world.connect()
    got: list[Message] = []
    await bus.subscribe("s", got.append)
    assert bus.max_payload == 100_000
    with pytest.raises(PayloadTooLarge, match="100001"):
        bus.publish("s", b"x" * 100_001)
    bus.publish("s", b"ok")
    await until(lambda: got)


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB b 0", "a\n", "\ta"])
async def test_what_is_no_subject_never_reaches_the_wire(world: World, subject: str) -> None:
    bus = await world.connect()
    with pytest.raises(ValueError, match="not a subject"):
        bus.publish(subject, b"")
    with pytest.raises(ValueError, match="not a subject"):
        await bus.subscribe(subject, lambda m: None)
    if subject:
        with pytest.raises(ValueError, match="not a subject"):
            bus.publish("fine", b"", reply=subject)


async def test_a_handler_that_raises_is_counted_and_the_next_message_arrives(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await world.connect()
    got: list[bytes] = []

    def handler(message: Message) -> None:
        if message.data == b"bad":
            raise RuntimeError("no good")
        got.append(message.data)

    await bus.subscribe("s", handler)
    bus.publish("s", b"bad")
    bus.publish("s", b"good")
    await until(lambda: got)
    assert bus.stats.handler_errors == 1
    assert "no good" in caplog.text


async def test_nonsense_is_counted_one_by_one_and_logged_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    bus = await world.connect()
    got: list[str] = []

    def handler(message: Message) -> None:
        got.append(bus_pb2.WorkerLost.FromString(message.data).worker)

    await bus.subscribe("s", handler)
    for _ in range(100):
        bus.publish("s", b"\xff\xff\xff")
    bus.publish("s", bus_pb2.WorkerLost(worker="w").SerializeToString())
    await until(lambda: got)
    assert (bus.stats.malformed, bus.stats.handler_errors) == (100, 0)
    assert caplog.text.count("malformed message to s, 3 bytes") == 1
    assert caplog.text.count("Traceback") == 1


async def test_what_is_published_during_an_outage_arrives_after_it_in_order(world: World) -> None:
    sender, receiver = await world.connect(), await world.connect()
    got: list[bytes] = []
    await receiver.subscribe("s", lambda m: got.append(m.data))
    before = receiver.reconnected_at
    await world.stop()
    assert not sender.connected
    with pytest.raises(BusUnavailable):
        await sender.flush(timeout_s=0.05)
    await world.start()
    # Else the sender's messages are there first, and nobody listens yet.
    await until(lambda: receiver.connected)
    await receiver.flush(timeout_s=LONG_S)
    assert receiver.reconnected_at > before
    assert receiver.stats.reconnects == 1
    for i in range(100):
        sender.publish("s", b"%d" % i)
    await until(lambda: len(got) == 100)
    assert got == [b"%d" % i for i in range(100)]


async def test_published_while_away(world: World) -> None:
    bus = await world.connect()  # one client: its own subscription is back before its buffer goes out
    got: list[bytes] = []
    await bus.subscribe("s", lambda m: got.append(m.data))
    await world.stop()
    for i in range(100):
        bus.publish("s", b"%d" % i)
    await world.start()
    await until(lambda: len(got) == 100)
    assert got == [b"%d" % i for i in range(100)]


async def test_the_outgoing_buffer_is_bounded(world: World) -> None:
    bus = await world.connect(pending_bytes=10_000)
    got: list[bytes] = []
    await bus.subscribe("s", lambda m: got.append(m.data))
    await world.stop()
    sent = 0
    with pytest.raises(BusUnavailable, match="wait"):
        for _ in range(100):
            bus.publish("s", b"x" * 1000)
            sent += 1
    assert 5 <= sent <= 10
    assert bus.stats.refused_publishes == 1
    await world.start()
    await until(lambda: len(got) == sent)
    bus.publish("s", b"room again")
    await until(lambda: got[-1] == b"room again")


async def test_a_closed_bus_says_so(world: World) -> None:
    bus = await world.connect()
    await bus.close()
    await bus.close()
    assert not bus.connected
    with pytest.raises(BusUnavailable):
        bus.publish("s", b"")
    with pytest.raises(BusUnavailable):
        await bus.flush(timeout_s=0.1)
    with pytest.raises(BusUnavailable):
        await bus.subscribe("s", lambda m: None)


async def test_close_sends_what_was_published(world: World) -> None:
    sender, receiver = await world.connect(), await world.connect()
    got: list[bytes] = []
    await receiver.subscribe("s", lambda m: got.append(m.data))
    sender.publish("s", b"last words")
    await sender.close()
    await until(lambda: got)


# --- the real server only


@pytest.fixture
async def server() -> AsyncIterator[NatsServer]:
    async with NatsServer() as made:
        yield made


async def test_a_paused_server_loses_nothing_and_the_buffer_holds(server: NatsServer) -> None:
    sender = await NatsBus.connect(server.url, options=NatsOptions(pending_bytes=1 << 20))
    receiver = await NatsBus.connect(server.url)
    got: list[bytes] = []
    await receiver.subscribe("s", lambda m: got.append(m.data))
    server.pause()
    sent = 0
    with pytest.raises(BusUnavailable, match="wait"):
        while sent < 4000:  # far more than sockets and buffers hold
            sender.publish("s", b"%d" % sent + b"." * 65_536)
            sent += 1
            await asyncio.sleep(0)
    with pytest.raises(BusUnavailable):
        await sender.flush(timeout_s=0.05)
    server.resume()
    await until(lambda: len(got) == sent)
    assert [int(data.partition(b".")[0]) for data in got] == list(range(sent))
    await sender.close()
    await receiver.close()


async def test_a_server_that_answers_no_ping_is_left(server: NatsServer) -> None:
    bus = await NatsBus.connect(server.url, options=NatsOptions(ping_interval_s=0.2, attempt_timeout_s=0.5))
    server.pause()
    await until(lambda: not bus.connected)
    server.resume()
    await until(lambda: bus.connected)
    await bus.flush(timeout_s=LONG_S)
    await bus.close()


async def test_a_flush_that_meets_the_loss_throws_no_backlog_away() -> None:
    connections: list[asyncio.StreamWriter] = []
    arrived = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        first = len(connections) == 1
        writer.write(b'INFO {"max_payload":1048576}\r\n')
        seen = b""
        while data := await reader.read(1 << 16):
            seen = seen[-20:] + data
            if b"PING\r\n" in seen:
                seen = b""
                writer.write(b"PONG\r\n")
                if first:
                    return  # and reads no more
            if b"the end" in seen:
                arrived.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    bus = await NatsBus.connect(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        for _ in range(60):  # more than the system's buffers take
            bus.publish("a.b", bytes(500_000))
            await asyncio.sleep(0)
        bus.publish("a.b", b"the end")
        flushing = asyncio.create_task(bus.flush(timeout_s=LONG_S))
        await asyncio.sleep(0.1)
        assert not flushing.done()
        connections[0].transport.abort()
        with pytest.raises(BusUnavailable, match="went away"):
            await flushing
        await asyncio.wait_for(arrived.wait(), LONG_S)
    finally:
        await bus.close()
        server.close()


async def test_nobody_there() -> None:
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1\b"):
        await NatsBus.connect("nats://user:secret@127.0.0.1:1", options=NatsOptions(connect_timeout_s=0.3))
    with pytest.raises(ConfigError):
        await NatsBus.connect("http://127.0.0.1:1")


async def test_it_talks_to_the_official_client(server: NatsServer) -> None:
    """Payloads with headers arrive without them, and the two agree on requests."""
    bus = await NatsBus.connect(server.url)
    official = await nats.connect(server.url)
    got: list[Message] = []
    await bus.subscribe("s", got.append)
    await bus.subscribe("echo", lambda m: bus.publish(m.reply, m.data))
    await official.publish("s", b"with headers", headers={"a": "b", "c": "503"})
    await official.publish("s", b"", headers={"a": "b"})
    await until(lambda: len(got) == 2)
    assert [(m.data, m.no_responders) for m in got] == [(b"with headers", False), (b"", False)]
    assert (await official.request("echo", b"x" * 1_000_000, timeout=LONG_S)).data == b"x" * 1_000_000
    await official.close()
    await bus.close()


async def test_user_and_password_by_options_and_by_url() -> None:
    async with NatsServer(extra_config='authorization { user: u, password: "p@:/ss" }') as server:
        for url, options in (
            (server.url, NatsOptions(user="u", password="p@:/ss")),
            (server.url.replace("//", "//u:p%40%3A%2Fss@"), NatsOptions()),
        ):
            bus = await NatsBus.connect(url, options=options)
            await bus.flush(timeout_s=LONG_S)
            await bus.close()
        with pytest.raises(BusUnavailable, match=r"(?i)authorization"):
            await NatsBus.connect(server.url, options=NatsOptions(user="u", password="no", connect_timeout_s=2.0))


def reload(server: NatsServer, extra: str) -> None:
    """The server goes on with ``extra`` as the last line of its configuration."""
    config = Path(server.command.argv[-1])
    lines = [line for line in config.read_text().splitlines() if "# only now" not in line]
    config.write_text("\n".join([*lines, extra, ""]))
    os.kill(server.pid, signal.SIGHUP)


async def test_it_comes_back_even_when_the_server_threw_it_out(server: NatsServer) -> None:
    """nats-py gives up for good when a server that it is connected to ends that with an error; the bus does not."""
    bus = await NatsBus.connect(server.url)
    got: list[bytes] = []
    bounced: list[Message] = []
    await bus.subscribe("s", lambda m: got.append(m.data))
    gone = await bus.subscribe("t", lambda m: got.append(m.data))
    await bus.subscribe("back", bounced.append)
    await gone.unsubscribe()

    reload(server, "authorization { token: secret } # only now")
    await until(lambda: not bus.connected)
    bus.publish("s", b"kept")
    await until(lambda: bus.stats.server_errors)

    reload(server, "")
    await until(lambda: got)
    bus.publish("s", b"new")
    bus.publish("t", b"", reply="back")
    await until(lambda: bounced)
    assert got == [b"kept", b"new"]
    await bus.close()


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.>", "a", False),
        ("a.>", "a.b.c", True),
        (">", "a.b", True),
        ("*.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a", "a.b", False),
    ],
)
def test_wildcard_matching(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected
