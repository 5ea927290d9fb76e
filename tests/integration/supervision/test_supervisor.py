"""The supervisor over real processes: ready, restarted, given up, taken down in order, and never outlived."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.adapters.processes import MAX_LINE_BYTES, run_directly
from tandem.adapters.supervision import Child, ProcessSpec, RestartPolicy, State, Supervisor
from tandem.errors import StartFailed

HERE = Path(__file__).parent
POLICY = RestartPolicy(first_s=0.02, longest_s=0.1)
GENEROUS_S = 30.0


class World:
    """A supervisor with what it said, and stubs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[tuple[str, str]] = []
        self.news: list[tuple[str, str]] = []
        self.supervisor = Supervisor(
            on_line=lambda name, line: self.lines.append((name, line)),
            on_news=lambda child, what: self.news.append((child.spec.name, what)),
            policy=POLICY,
        )

    def stub(
        self,
        name: str,
        mode: str = "serve",
        *,
        grace_s: float = GENEROUS_S,
        start_s: float = GENEROUS_S,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> Child:
        async def ready() -> bool:
            return (self.folder / f"{name}.ready").exists()

        argv = [sys.executable, str(HERE / "stub.py"), mode, str(self.folder), name]
        spec = ProcessSpec(
            name=name, launch=run_directly(argv), env=dict(os.environ), ready=ready, start_timeout_s=start_s,
            grace_s=grace_s, stop_signal=stop_signal, hands_over=mode == "hand-over",
        )  # fmt: skip
        return self.supervisor.add(spec)

    def starts(self, name: str) -> int:
        path = self.folder / f"{name}.starts"
        return len(path.read_text().split()) if path.exists() else 0

    def order(self) -> list[str]:
        return (self.folder / "order").read_text().split()


@pytest.fixture
async def world(tmp_path: Path):
    made = World(tmp_path)
    yield made
    made.supervisor.kill_all()
    await made.supervisor.stop([])


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(GENEROUS_S):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    """Zombies are as good as gone: their parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_ready_means_the_probe_said_so(world: World) -> None:
    child = world.stub("a")
    assert child.state is State.STARTING
    await world.supervisor.wait_ready(["a"])
    assert child.state is State.READY
    assert int((world.folder / "a.ready").read_text()) == child.pid
    assert ("a", "a begins") in world.lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_is_told_to_leave_by_its_signal(world: World, number: signal.Signals) -> None:
    world.stub("a", stop_signal=number)
    await world.supervisor.wait_ready(["a"])
    await world.supervisor.stop([["a"]])
    assert (world.folder / "a.signal").read_text() == number.name


async def test_one_that_is_not_ready_is_told_by_sigterm(world: World) -> None:
    """It may not listen to any other yet."""
    world.stub("a", "never-ready", stop_signal=signal.SIGINT)
    await until(lambda: ("a", "a begins") in world.lines)
    await asyncio.sleep(0.3)
    await world.supervisor.stop([["a"]])
    assert (world.folder / "a.signal").read_text() == "SIGTERM"


async def test_what_dies_is_started_again(world: World) -> None:
    child = world.stub("a")
    await world.supervisor.wait_ready(["a"])
    first = child.pid
    (world.folder / "a.ready").unlink()
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.restarts == 1 and child.state is State.READY)
    assert child.pid != first
    assert any("SIGKILL" in what for _, what in world.news)


async def test_one_that_hands_over_finishes_beside_its_successor(world: World) -> None:
    child = world.stub("a", "hand-over")
    await world.supervisor.wait_ready(["a"])
    first = child.pid
    os.kill(first, signal.SIGTERM)
    await until(lambda: child.restarts == 1 and child.state is State.READY)
    assert child.pid != first
    assert alive(first)
    (world.folder / "a.go").touch()
    await until(lambda: not alive(first))
    await until(lambda: ("a", "ended with status 0") in world.news)
    assert not child.predecessors


async def test_what_hands_over_goes_down_with_its_successor(world: World) -> None:
    child = world.stub("a", "hand-over", grace_s=1.0)
    await world.supervisor.wait_ready(["a"])
    first = child.pid
    os.kill(first, signal.SIGTERM)
    await until(lambda: child.restarts == 1 and child.state is State.READY)
    second = child.pid
    await world.supervisor.stop([["a"]])
    assert not alive(first)
    assert not alive(second)


async def test_what_never_starts_ends_it_with_its_last_words(world: World) -> None:
    world.stub("good")
    world.stub("bad", "crash")
    with pytest.raises(StartFailed) as failure:
        await world.supervisor.wait_ready(["good", "bad"])
    assert "bad failed to start 3 times, last with status 3" in failure.value.message
    assert "the reason why" in failure.value.message
    assert world.starts("bad") == 3


async def test_a_refused_configuration_is_not_tried_again(world: World) -> None:
    world.stub("bad", "mistake")
    with pytest.raises(StartFailed, match="no such option"):
        await world.supervisor.wait_ready(["bad"])
    assert world.starts("bad") == 1


async def test_after_the_first_ready_it_is_tried_for_ever(world: World) -> None:
    child = world.stub("a")
    await world.supervisor.wait_ready(["a"])
    for restarts in range(1, POLICY.start_attempts + 2):
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda n=restarts: child.restarts == n and child.state is State.READY)  # type: ignore[misc]


async def test_what_cannot_be_executed_is_told_in_words(world: World) -> None:
    async def ready() -> bool:
        return False

    world.supervisor.add(ProcessSpec(name="gone", launch=run_directly(["/no/such/program"]), env={}, ready=ready))
    with pytest.raises(StartFailed, match="cannot execute /no/such/program: No such file"):
        await world.supervisor.wait_ready(["gone"])


async def test_not_ready_in_time_counts_as_a_failed_start(world: World) -> None:
    world.stub("slow", "never-ready", start_s=0.2)
    with pytest.raises(StartFailed, match=r"(?s)SIGKILL.*not ready after 0.2 s"):
        await world.supervisor.wait_ready(["slow"])


async def test_stages_go_down_one_after_the_other(world: World) -> None:
    names = ["server", "worker-1", "worker-2", "frontend"]
    children = [world.stub(name) for name in names]
    await world.supervisor.wait_ready(names)
    pids = [child.pid for child in children]
    await world.supervisor.stop([["frontend"], ["worker-1", "worker-2"], ["server"]])
    order = world.order()
    assert (order[0], set(order[1:3]), order[3]) == ("frontend", {"worker-1", "worker-2"}, "server")
    assert not any(alive(pid) for pid in pids)
    assert all(world.starts(name) == 1 for name in names)
    assert not world.supervisor.children


async def test_who_does_not_leave_is_killed(world: World) -> None:
    child = world.stub("mule", "stubborn", grace_s=0.3)
    await world.supervisor.wait_ready(["mule"])
    pid = child.pid
    await world.supervisor.remove("mule")
    assert world.order() == ["mule"]
    assert not alive(pid)


async def test_kill_all_does_not_wait_for_anybodys_grace(world: World) -> None:
    child = world.stub("mule", "stubborn", grace_s=1000.0)
    await world.supervisor.wait_ready(["mule"])
    pid = child.pid
    stopping = asyncio.create_task(world.supervisor.stop([["mule"]]))
    await until(lambda: (world.folder / "order").exists())
    world.supervisor.kill_all()
    async with asyncio.timeout(GENEROUS_S):
        await stopping
    assert not alive(pid)


async def test_removed_while_it_waits_to_be_restarted(world: World) -> None:
    world.supervisor = Supervisor(
        on_line=lambda *_: None, on_news=lambda *_: None, policy=RestartPolicy(first_s=1000.0, longest_s=1000.0)
    )
    child = world.stub("bad", "crash")
    await until(lambda: child.state is State.WAITING)
    async with asyncio.timeout(GENEROUS_S):
        await world.supervisor.remove("bad")
    assert world.starts("bad") == 1


async def test_what_a_process_started_goes_with_it(world: World) -> None:
    child = world.stub("p", "parent")
    await world.supervisor.wait_ready(["p"])
    grandchild = int((world.folder / "p.child").read_text())
    assert alive(grandchild)
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: not alive(grandchild))


async def test_long_lines_are_cut_and_the_unfinished_one_is_shown(world: World) -> None:
    child = world.stub("b", "babble")
    await world.supervisor.wait_ready(["b"])
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: ("b", "last") in world.lines)
    said = [line for name, line in world.lines if name == "b" and line.startswith("x")]
    assert sum(map(len, said)) == 40_000
    assert max(map(len, said)) <= MAX_LINE_BYTES


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "supervised.py"), str(tmp_path), "a", "b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "up\n"
        pids = [int((tmp_path / f"{name}.ready").read_text()) for name in "ab"]
        assert all(alive(pid) for pid in pids)
        supervisor.kill()
    asyncio.run(until(lambda: not any(alive(pid) for pid in pids)))
