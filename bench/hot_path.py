"""CPU of the hot path without sockets and other processes: the frontend from a request's bytes to its answer's, the
router from a Submit to its Assignment; and both as ratios to a fixed yardstick in the same process.

    python -m bench.hot_path [--requests 300] [--profile ISL/OSL/BURST | --alone]

Everything is as `tandem up` has it (authentication, metrics, tracing as by default, deadlines); a stand-in of the bus
plays the rest of the cluster, outside what is timed. CPU time, not wall time: other work on the machine hardly shows,
and the ratio to the yardstick hardly depends on the machine. tests/unit/test_hot_path.py holds the ratios.

``--alone``: what one request takes that comes by itself, by what came before it. A process that has slept finds its
caches, its branch predictors and its translations of addresses cold, and this is what that costs.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import hashlib
import json
import mmap
import pstats
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from bench.serve.load import chat, words
from services.frontend.app import Frontend
from services.frontend.config import FrontendSettings
from tandem.adapters import deployment
from tandem.adapters.bus import BusStats, Handler, Message
from tandem.adapters.entry import collect_rarely
from tandem.models.prepare import resolve_model
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import subjects

MODEL = "SmolLM2-135M-Instruct"
KEY = "hot-path"


class StandIn:
    """The bus, with whoever is on its other side: keeps what is submitted, delivers what it is given."""

    def __init__(self) -> None:
        self.stats = BusStats()
        self.connected = True
        self.reconnected_at = 1.0
        self.max_payload = 8 << 20
        self.submits: list[bytes] = []
        self.handlers: dict[str, Handler] = {}

    def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        self.submits.extend(bus_pb2.Submits.FromString(data).submits)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> StandIn:
        self.handlers[subject] = handler
        return self

    async def unsubscribe(self) -> None: ...

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        raise NotImplementedError

    async def flush(self, *, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


class Socket(asyncio.Transport):
    """Swallows what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.writes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        self.writes += 1

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class FrontendPath:
    """``batch`` requests at once, each answered by frames of ``burst`` tokens a request."""

    def __init__(self, folder: Path, *, tokenizer: str = "auto") -> None:
        self.bus = StandIn()
        model: dict[str, Any] = {"name": MODEL, "path": str(folder), "max_model_len": 16384, "tokenizer": tokenizer}
        model["pools"] = [{"role": "aggregated", "engine": "sim"}]
        tenant = {"name": "t", "api_key_sha256": [hashlib.sha256(KEY.encode()).hexdigest()]}
        wanted = deployment.parse(json.dumps({"cluster": "c", "models": [model], "tenants": [tenant]}))
        self.frontend = Frontend(FrontendSettings(deployment="", http_port=0, grpc_port=0), wanted, self.bus)
        self._words = words(folder / "tokenizer.json")
        vocabulary = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
        self._ids = [vocabulary["Ġ" + word] for word in self._words]  # each is text by itself
        self._rng = random.Random(0)

    async def open(self) -> None:
        await self.frontend.cluster.open()
        config = self.frontend._http.config
        config.load()
        self._connection = lambda: config.http_protocol_class(  # type: ignore[operator,union-attr]
            config=config, server_state=self.frontend._http.server_state, app_state={}
        )

    async def close(self) -> None:
        await self.frontend.close()

    def _lead(self) -> None:
        announcement = bus_pb2.LeaderAnnouncement(model=MODEL, router="r", epoch=1)
        message = Message(subjects.leader("c", MODEL), announcement.SerializeToString())
        self.bus.handlers[subjects.all_leaders("c")](message)

    async def run(
        self, *, isl: int, osl: int, batch: int, burst: int, before: Callable[[], object] = lambda: None
    ) -> float:
        """CPU seconds per request. ``before`` each message that comes, that is called, outside what is timed."""
        requests = [self._request(isl, osl) for _ in range(batch)]
        self._lead()
        self.bus.submits.clear()
        sockets = [Socket() for _ in range(batch)]
        connections = [self._connection() for _ in range(batch)]
        for connection, socket in zip(connections, sockets, strict=True):
            connection.connection_made(socket)
        before()
        spent = await _timed(lambda: [c.data_received(r) for c, r in zip(connections, requests, strict=True)],
                             lambda: len(self.bus.submits) >= batch, self._lead)  # fmt: skip
        frames = self._frames([bus_pb2.Submit.FromString(data) for data in self.bus.submits], osl, burst)
        deliver = self.bus.handlers[subjects.tokens("c", self.frontend.instance)]
        for frame in frames:
            message = Message("tokens", frame)
            count = sum(socket.writes for socket in sockets) + batch

            def written(count: int = count) -> bool:
                return sum(socket.writes for socket in sockets) >= count

            def ended() -> bool:
                return all(socket.written.endswith(b"0\r\n\r\n") for socket in sockets)

            before()
            spent += await _timed(lambda message=message: deliver(message),  # type: ignore[misc]
                                  ended if frame is frames[-1] else written, self._lead)  # fmt: skip
        for connection, socket in zip(connections, sockets, strict=True):
            assert socket.written.count(b'"content":"') >= osl // 2
            connection.connection_lost(None)
        return spent / batch

    def _request(self, isl: int, osl: int) -> bytes:
        text = " ".join(self._rng.choices(self._words, k=isl - 30))
        body = chat(MODEL, [{"role": "user", "content": text}], osl).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def _frames(self, submits: list[bus_pb2.Submit], osl: int, burst: int) -> list[bytes]:
        worker = types_pb2.WorkerRef(id="w", incarnation=1)
        rids = [submit.rid for submit in submits]
        frames = []
        for seq in range(0, osl, burst):
            count = min(burst, osl - seq)
            frame = bus_pb2.TokenFrame(worker=worker, rids=rids, seqs=[seq] * len(rids), counts=[count] * len(rids))
            frame.tokens = array("I", self._rng.choices(self._ids, k=count * len(rids))).tobytes()
            if not seq:
                frame.placed.extend(bus_pb2.Placed(rid=rid, leg=bus_pb2.LEG_LOCAL) for rid in rids)
            if seq + count == osl:
                reason = types_pb2.FINISH_REASON_LENGTH
                frame.finishes.extend(bus_pb2.Finish(rid=rid, reason=reason, output_tokens=osl) for rid in rids)
            frames.append(frame.SerializeToString())
        return frames


async def _timed(begin: Callable[[], object], done: Callable[[], bool], announce: Callable[[], None]) -> float:
    """CPU seconds from ``begin`` until the event loop has brought about ``done``; ``announce`` keeps the leader known
    where that takes long."""
    started = time.process_time()
    begin()
    for _ in range(1000):
        await asyncio.sleep(0)
        if done():
            break
    else:
        async with asyncio.timeout(30):
            while not done():  # a thread tokenises
                await asyncio.sleep(0.002)
                announce()
    return time.process_time() - started


def yardstick() -> float:
    """CPU seconds of a fixed piece of work of the same kind: objects, dictionaries, bytes and JSON in Python."""
    started = time.process_time()
    for number in range(40):
        rows = [{"id": f"r{i}", "value": i * number, "parts": [str(j) for j in range(8)]} for i in range(40)]
        text = json.dumps(rows)
        total = sum(len(row["parts"]) + row["value"] for row in json.loads(text))
        hashlib.sha256(f"{text}{total}".encode()).digest()
    return time.process_time() - started


async def frontend_figures(count: int, *, tokenizer: str = "auto") -> dict[str, float]:
    """Microseconds per request, the least of some batches; and ``yardstick``, its own."""
    path = FrontendPath(resolve_model(MODEL, weights=False, progress=lambda line: None), tokenizer=tokenizer)
    await path.open()
    try:
        shapes = {
            "128/32 burst": {"isl": 128, "osl": 32, "burst": 32},
            "128/32 paced": {"isl": 128, "osl": 32, "burst": 1},
            "1024/128 burst": {"isl": 1024, "osl": 128, "burst": 32},
            "1024/128 paced": {"isl": 1024, "osl": 128, "burst": 1},
        }
        await path.run(isl=128, osl=32, batch=16, burst=8)
        found: dict[str, list[float]] = {}
        for _ in range(max(1, count // 64)):
            for name, shape in shapes.items():
                found.setdefault(name, []).append(1e6 * await path.run(batch=32, **shape))
            found.setdefault("yardstick", []).append(1e6 * yardstick())
        return {name: min(values) for name, values in found.items()}
    finally:
        await path.close()


def _drop_translations() -> None:
    """Unmaps so much that the kernel drops all of the process's translations at once."""
    with mmap.mmap(-1, 1 << 20) as area:
        for page in range(0, len(area), mmap.PAGESIZE):
            area[page] = 1


def _between() -> dict[str, Callable[[], object]]:
    """What may come before a message."""
    area = mmap.mmap(-1, 8 << 20)  # a core's second-level cache holds less
    area.madvise(mmap.MADV_HUGEPAGE)  # reading these takes the place of few translations
    area.write(bytes(len(area)))
    return {
        "at once": lambda: None,
        "4 MB read": partial(area.find, b"x", 0, 4 << 20),
        "translations dropped": _drop_translations,
        **{f"{ms} ms asleep": partial(time.sleep, ms / 1e3) for ms in (1, 2, 5, 10)},
    }


async def alone_figures(count: int) -> dict[str, float]:
    """Microseconds of CPU of a request that is alone, 128/32, all tokens in one frame: the median of each kind."""
    path = FrontendPath(resolve_model(MODEL, weights=False, progress=lambda line: None))
    await path.open()
    try:
        found: dict[str, float] = {}
        for name, before in _between().items():
            spent = [await path.run(isl=128, osl=32, batch=1, burst=32, before=before) for _ in range(50 + count)]
            found[name] = 1e6 * statistics.median(spent[50:])
        return found
    finally:
        await path.close()


async def _profile(isl: int, osl: int, burst: int) -> None:
    path = FrontendPath(resolve_model(MODEL, weights=False))
    await path.open()
    await path.run(isl=isl, osl=osl, batch=32, burst=burst)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(4):
        await path.run(isl=isl, osl=osl, batch=64, burst=burst)
    profile.disable()
    pstats.Stats(profile, stream=sys.stdout).sort_stats("cumulative").print_stats(90)
    await path.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--tokenizer", default="auto", choices=("auto", "hf"))
    parser.add_argument("--profile", metavar="ISL/OSL/BURST", help="cProfile of such requests instead")
    parser.add_argument("--alone", action="store_true", help="one request at a time, by what came before it, instead")
    options = parser.parse_args()
    collect_rarely()
    if options.profile:
        uvloop.run(_profile(*map(int, options.profile.split("/"))))
        return
    if options.alone:
        for name, value in uvloop.run(alone_figures(options.requests)).items():
            print(f"frontend 128/32 alone, {name:22} {value:8.0f} us/request")
        return
    figures = uvloop.run(frontend_figures(options.requests, tokenizer=options.tokenizer))
    unit = figures.pop("yardstick")
    print(f"yardstick {unit / 1e3:.1f} ms")
    for name, value in figures.items():
        print(f"frontend {name:16} {value:8.0f} us/request  {value / unit:.4f} yardsticks")


if __name__ == "__main__":
    main()
