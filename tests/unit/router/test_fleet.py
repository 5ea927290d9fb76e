"""Who is alive, by reports, silence and gRPC health; and what is the bus's fault, not theirs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from services.router.fleet import BUS_GRACE_S, Fleet, FleetListener, Loss
from tandem.adapters import clock
from tandem.adapters.deployment import Liveness
from tandem.adapters.embedded import free_port
from tandem.adapters.grpc_server import GrpcServer
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.adapters.memory_store import MemoryRegistry, MemoryStore
from tandem.core.types import Role, WorkerAddress, WorkerSpec
from tandem.v1 import bus_pb2, types_pb2

SUSPECT_S, HOP_S, DEAD_S = 1.5, 2.0, 6.0


def spec(name: str, address: str, incarnation: int = 1) -> WorkerSpec:
    return WorkerSpec(
        address=WorkerAddress(name, incarnation, address), model="m", role=Role.DECODE, slot=0, block_size=16,
        dtype="bf16", kv_layout="l", engine="sim", engine_version="1", max_model_len=64, kv_blocks_total=10,
        kv_bytes_per_token=1, max_batched_tokens=64, max_num_seqs=8, perf_profile="p",
    )  # fmt: skip


class World:
    """A fleet with a clock that jumps, and processes that answer, hang or are gone."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._ahead_s = 0.0
        self.hub = MemoryHub()
        self.store = MemoryStore(now=self.now)
        self.registry = MemoryRegistry(self.store)
        self.news: list[str] = []
        self.losses: list[Loss] = []
        self.fleet = Fleet(
            bus=MemoryBus(self.hub),
            registry=self.registry,
            model="m",
            liveness=Liveness(suspect_s=SUSPECT_S, dead_s=DEAD_S),
            hop_timeout_s=HOP_S,
            listener=FleetListener(
                up=lambda s: self.news.append(f"up {s.id}"),
                suspect=lambda w, yes: self.news.append(f"{'suspect' if yes else 'trust'} {w}"),
                lost=self._lost,
                hung=lambda w: self.news.append(f"hung {w}"),
            ),
            now=self.now,
        )

    def now(self) -> float:
        return clock.monotonic() + self._ahead_s

    def _lost(self, loss: Loss) -> None:
        self.news.append(f"lost {loss.worker}")
        self.losses.append(loss)

    async def alive(self) -> str:
        server = GrpcServer("127.0.0.1")
        await server.start()
        self._stack.push_async_callback(server.stop, 0.0)
        return f"127.0.0.1:{server.port}"

    async def hung(self) -> str:
        server = await asyncio.start_server(self._swallow, "127.0.0.1", 0)
        self._stack.callback(server.close)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _swallow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    def gone(self) -> str:
        return f"127.0.0.1:{free_port()}"

    async def join(self, name: str, address: str, incarnation: int = 1) -> WorkerSpec:
        joined = await self.registry.register(spec(name, address, incarnation), ttl_s=1000.0)
        await self.fleet.look()
        self.report(name, incarnation)
        return joined

    def report(self, name: str, incarnation: int = 1) -> bool:
        return self.fleet.heard(
            bus_pb2.LoadReport(worker=types_pb2.WorkerRef(id=name, incarnation=incarnation), model="m")
        )

    async def later(self, seconds: float) -> None:
        """Time passes in silence, and whoever is asked meanwhile has answered, or has not."""
        self._ahead_s += seconds
        self.fleet.look_for_silence()
        await self.answers()

    async def answers(self) -> None:
        probes = [m.probe for m in self.fleet.members.values() if m.probe is not None]
        async with asyncio.timeout(10.0):
            await asyncio.gather(*probes)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(stack)
        yield world
        await world.fleet.close()


async def test_silence_makes_suspect_a_report_makes_good(world: World) -> None:
    await world.join("w", await world.alive())
    await world.later(SUSPECT_S - 0.2)
    assert world.news == ["up w"]
    await world.later(0.3)
    assert world.news == ["up w", "suspect w"]
    assert world.report("w")
    assert world.news[-1] == "trust w"


async def test_who_answers_for_his_health_is_not_lost_however_silent(world: World) -> None:
    await world.join("w", await world.alive())
    await world.later(100.0)
    assert world.news == ["up w", "suspect w"]


async def test_a_process_that_hangs_is_hung_then_dead_but_not_gone(world: World) -> None:
    await world.join("w", await world.hung())
    await world.later(HOP_S)
    assert world.news == ["up w", "suspect w", "hung w"]
    await world.later(DEAD_S)
    assert world.news[-1] == "lost w"
    assert not world.losses[0].gone
    assert "w" not in world.fleet.members


async def test_a_refused_probe_is_the_end_at_once(world: World) -> None:
    await world.join("w", world.gone())
    await world.later(SUSPECT_S + 0.1)
    assert world.news == ["up w", "suspect w", "lost w"]
    assert world.losses[0].gone


async def test_a_message_that_nobody_took_asks_at_once(world: World) -> None:
    await world.join("dead", world.gone())
    await world.join("alive", await world.alive())
    for name in ("dead", "alive", "unknown"):
        world.fleet.no_responders(name)
    await world.answers()
    assert [loss.worker for loss in world.losses] == ["dead"]
    assert world.fleet.members["alive"].suspect


async def test_who_is_heard_while_he_is_asked_lives(world: World) -> None:
    await world.join("w", await world.hung())
    world._ahead_s += DEAD_S + 1
    world.fleet.look_for_silence()
    world.report("w")
    await world.answers()
    assert not world.losses


async def test_the_dead_do_not_rise_from_the_registry_but_by_their_own_word(world: World) -> None:
    await world.join("w", await world.hung())
    await world.later(DEAD_S + 1)
    await world.fleet.look()
    assert world.news[-1] == "lost w", "its entry lives on; it does not"
    assert not world.report("w"), "not a member yet"
    await world.fleet.look()
    assert world.news[-1] == "up w"
    assert world.report("w")


async def test_a_restart_is_a_loss_and_a_newcomer(world: World) -> None:
    address = await world.alive()
    await world.join("w", address)
    await world.join("w", address, incarnation=2)
    assert world.news == ["up w", "lost w", "up w"]
    assert (world.losses[0].incarnation, world.losses[0].gone) == (1, True)
    assert not world.report("w", 1), "the dead one's last words"
    assert world.report("w", 2)


async def test_news_of_a_known_worker_are_told(world: World) -> None:
    joined = await world.join("w", await world.alive())
    changed = dataclasses.replace(joined, role=Role.PREFILL)
    await world.registry.refresh(changed, ttl_s=100.0)
    await world.fleet.look()
    assert world.news == ["up w", "up w"]
    assert world.fleet.members["w"].spec.role is Role.PREFILL


async def test_who_said_goodbye_is_gone_without_being_asked(world: World) -> None:
    joined = await world.join("w", await world.alive())
    leaving = dataclasses.replace(joined, draining=True)
    await world.registry.refresh(leaving, ttl_s=100.0)
    await world.fleet.look()
    await world.registry.deregister(leaving)
    world._ahead_s += SUSPECT_S + 0.1
    await world.fleet.look()
    assert [(loss.why, loss.gone) for loss in world.losses] == [("left", True)]


async def test_a_store_that_forgot_everybody_loses_nobody(world: World) -> None:
    await world.join("w", await world.alive())
    world.store.wipe()
    await world.fleet.look()
    world._ahead_s += SUSPECT_S + 0.1
    await world.fleet.look()
    await world.answers()
    world.store.available = False
    await world.fleet.look()
    assert not world.losses


async def test_no_one_is_suspect_while_our_own_bus_is_away(world: World) -> None:
    await world.join("w", world.gone())
    world.hub.stop()
    await world.later(DEAD_S + 1)
    world.fleet.no_responders("w")
    assert world.news == ["up w"]


async def test_after_a_reconnect_silence_counts_anew_and_after_a_grace(world: World) -> None:
    await world.join("w", world.gone())
    world.hub.stop()
    world._ahead_s += 2 * DEAD_S
    behind, world._ahead_s = world._ahead_s, 0.0  # the bus has the real clock
    world.hub.start()
    assert world.fleet.bus_in_doubt()
    await world.later(BUS_GRACE_S - 0.5)
    world.fleet.no_responders("w")
    assert world.news == ["up w"] and behind
    await world.later(0.7)
    assert world.news == ["up w", "suspect w", "lost w"]


async def test_a_bus_that_does_not_answer_a_flush_is_to_blame(world: World) -> None:
    await world.join("w", world.gone())
    world.fleet.no_responders("w")
    world.hub.stop()
    await world.answers()
    assert not world.losses


async def test_a_first_connection_casts_no_doubt(world: World) -> None:
    assert not world.fleet.bus_in_doubt()
