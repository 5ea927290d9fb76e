"""The fork launcher: a child is what ``python -m`` would have been, and nobody outlives its parent."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tandem.engine.launcher import ForkLauncher
from tandem.errors import EngineFailed

TALK = """
import atexit, json, os, sys, tandem.engine.launcher as launcher
atexit.register(lambda: print("atexit"))
def main():
    print(json.dumps({"env": dict(os.environ), "name": __name__, "forked": launcher.is_forked(), "argv": sys.argv}))
    print("words", file=sys.stderr)
    sys.exit(int(os.environ["CODE"]))
if __name__ == "__main__":
    main()
"""
SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"
CRASH = "raise RuntimeError('no good')\n"


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    for name, text in (("talk", TALK), ("sleeper", SLEEP), ("crash", CRASH)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


class Exits:
    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.changed = asyncio.Event()

    def __call__(self, child: str, code: int) -> None:
        self.codes[child] = code
        self.changed.set()

    async def of(self, child: str) -> int:
        async with asyncio.timeout(30):
            while child not in self.codes:
                self.changed.clear()
                await self.changed.wait()
        return self.codes[child]


@pytest.fixture
async def launched(modules: Path) -> AsyncIterator[tuple[ForkLauncher, Exits, Path]]:
    exits = Exits()
    launcher = ForkLauncher(exits, preload="none", env=os.environ | {"PYTHONPATH": f"{modules}:{_root()}/src"})
    await launcher.start()
    yield launcher, exits, modules
    await launcher.stop()


def _root() -> Path:
    return Path(__file__).parents[2]


async def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_child_is_what_python_m_would_be(launched: tuple[ForkLauncher, Exits, Path]) -> None:
    launcher, exits, folder = launched
    env = {"CODE": "7", "ONLY": "this"}
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        pid = await launcher.spawn("t", "talk", env, out.fileno(), err.fileno())
    assert await exits.of("t") == 7
    first, last = (folder / "out").read_text().splitlines()
    said = json.loads(first)
    assert {k: v for k, v in said["env"].items() if k != "LC_CTYPE"} == env
    assert (said["name"], said["forked"], last) == ("__main__", True, "atexit")
    assert (folder / "err").read_text() == "words\n"
    assert not _alive(pid)


async def test_a_crash_is_seen_and_the_launcher_lives(launched: tuple[ForkLauncher, Exits, Path]) -> None:
    launcher, exits, folder = launched
    with (folder / "out").open("wb") as out:
        await launcher.spawn("c", "crash", {}, out.fileno())
        assert await exits.of("c") == 1
        pid = await launcher.spawn("s", "sleeper", {}, out.fileno())
        os.kill(pid, signal.SIGTERM)
        assert await exits.of("s") == -signal.SIGTERM
    assert "RuntimeError: no good" in (folder / "out").read_text()


async def test_stopping_takes_all_down(launched: tuple[ForkLauncher, Exits, Path]) -> None:
    launcher, _, folder = launched
    with (folder / "out").open("wb") as out:
        pids = [await launcher.spawn(str(i), "sleeper", {}, out.fileno()) for i in range(3)]
    await launcher.stop()
    await _until(lambda: not any(map(_alive, pids)), "children outlived stop()")


async def test_a_dead_launcher_is_reported_for_each_child(launched: tuple[ForkLauncher, Exits, Path]) -> None:
    launcher, exits, folder = launched
    with (folder / "out").open("wb") as out:
        pid = await launcher.spawn("s", "sleeper", {}, out.fileno())
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGKILL)
    assert await exits.of("s") == -signal.SIGKILL
    await _until(lambda: not _alive(pid), "the child outlived its launcher")
    with pytest.raises(EngineFailed):
        await launcher.spawn("n", "sleeper", {}, 1)


def test_killing_the_supervisor_takes_all_down(modules: Path) -> None:
    supervisor = """
import asyncio, os
from tandem.engine.launcher import ForkLauncher
async def main():
    launcher = ForkLauncher(lambda *_: None, preload="none")
    await launcher.start()
    pids = [await launcher.spawn(str(i), "sleeper", dict(os.environ), 2) for i in range(2)]
    print(launcher.pid, *pids, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    env = os.environ | {"PYTHONPATH": f"{modules}:{_root()}/src"}
    process = subprocess.Popen(
        [sys.executable, "-c", supervisor], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 3 and all(map(_alive, pids))
    process.kill()
    process.wait()
    asyncio.run(_until(lambda: not any(map(_alive, pids)), "something outlived the supervisor"))
