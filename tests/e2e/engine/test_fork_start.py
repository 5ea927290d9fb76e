"""Two vLLM engines forked from one launcher: quickly there, a handoff between them, idle at rest, and gone with it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.launcher import ForkLauncher
from tandem.models.prepare import prepare_tiny

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(300)

_ROOT = Path(__file__).parents[3]
_TICK = os.sysconf("SC_CLK_TCK")


def _stats() -> dict[int, tuple[int, float, str]]:
    """pid -> (parent, CPU seconds, name) of every living process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        if rest[0] != "Z":
            found[int(path.parent.name)] = (int(rest[1]), (int(rest[11]) + int(rest[12])) / _TICK, name)
    return found


def _tree(root: int) -> set[int]:
    stats = _stats()
    tree = {root} & stats.keys()
    while more := {pid for pid, (parent, _, _) in stats.items() if parent in tree} - tree:
        tree |= more
    return tree


def _listening(folder: str, *workers: str) -> bool:
    for worker in workers:
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(f"{folder}/{worker}.sock"):  # the file is there a moment before anybody listens
                return False
    return True


async def _ask(folder: str, worker: str, job: dict[str, Any]) -> dict[str, Any]:
    reader, writer = await asyncio.open_unix_connection(f"{folder}/{worker}.sock", limit=1 << 20)
    writer.write(json.dumps(job).encode() + b"\n")
    answer: dict[str, Any] = json.loads(await asyncio.wait_for(reader.readline(), 60))
    writer.close()
    return answer


async def test_two_engines_from_one_launcher(tmp_path: Path) -> None:
    model = str(prepare_tiny(progress=lambda _: None))
    began = time.monotonic()
    exits: dict[str, int] = {}
    env = os.environ | {"PYTHONPATH": f"{_ROOT / 'src'}:{_ROOT}"}
    launcher = ForkLauncher(exits.__setitem__, env=env)
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder, (tmp_path / "log").open("wb") as log:
        try:
            await launcher.start()
            imported = time.monotonic()
            pids = {}
            for worker in ("p", "d"):
                node = env | {"NODE_WORKER": worker, "NODE_FOLDER": folder, "NODE_MODEL": model}
                pids[worker] = await launcher.spawn(worker, "tests.e2e.engine.node", node, log.fileno())
            while not _listening(folder, *pids):
                assert not exits and time.monotonic() - began < 200, (tmp_path / "log").read_text()[-4000:]
                await asyncio.sleep(0.05)
            ready = time.monotonic()

            prompt = list(range(1000, 1300))
            made = await _ask(folder, "p", {"prompt": prompt, "max_tokens": 1, "produce": True})
            remote = await _ask(folder, "d", {"prompt": prompt, "max_tokens": 8, "handoff": made["handoff"]})
            first = time.monotonic()
            local = await _ask(folder, "p", {"prompt": prompt, "max_tokens": 8})
            assert remote["transferred_bytes"] and remote["tokens"] == local["tokens"]
            print(f"import {imported - began:.1f} s, P and D {ready - imported:.1f} s, handoff {first - ready:.2f} s")

            assert launcher.pid is not None
            tree = _tree(launcher.pid)
            assert len(tree) == 5, "the launcher, two workers, two cores"
            await asyncio.sleep(1.0)
            before = _stats()
            await asyncio.sleep(8.0)
            used = {pid: (_stats()[pid][1] - before[pid][1]) / 8.0 for pid in tree}
            print({f"{before[pid][2]} {pid}": f"{share:.1%}" for pid, share in sorted(used.items())})
            assert all(share < 0.05 for share in used.values()), used

            os.kill(launcher.pid, signal.SIGKILL)
            deadline = time.monotonic() + 20
            while left := tree & _stats().keys():
                assert time.monotonic() < deadline, f"outlived the launcher: {left}"
                await asyncio.sleep(0.05)
            while len(exits) < 2:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            assert exits == {"p": -signal.SIGKILL, "d": -signal.SIGKILL}
        finally:
            await launcher.stop()
