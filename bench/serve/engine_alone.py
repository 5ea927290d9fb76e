"""The simulated engine by itself: the time to first token that a client would see with nothing in between.

    python -m bench.serve.engine_alone [--isl 128] [--osl 32] [--seconds 2]

One request after the other, in a process of its own, made and run as a worker makes and runs it. Between requests it
rests for as long as the rest of a serving stack takes, so that its caches are as cold as a worker's. Prints JSON: p50
and p99, milliseconds. What a stack adds is its TTFT over these.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from array import array

import uvloop

from bench.serve.stacks import MODEL, Engines, sim_args
from tandem.adapters.entry import collect_rarely
from tandem.core.types import SamplingParams
from tandem.engine.protocol import EngineConfig, EngineOutput, EngineRequest
from tandem.engine.sim import SimEngine
from tandem.models.prepare import resolve_model

_REST_S = 0.002


async def ttft_ms(engines: Engines, *, isl: int, osl: int, seconds: float) -> list[float]:
    """Of each request."""
    rng, found = random.Random(0), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        engine = SimEngine(
            EngineConfig(
                engine="sim",
                model_path=str(resolve_model(MODEL, weights=False)),
                served_model=MODEL,
                worker_id="alone",
                run_dir=folder,
                disaggregated=False,
                max_model_len=16384,
                block_size=engines.block_size,
                dtype="auto",
                kv_lease_s=30.0,
                kv_host="127.0.0.1",
                kv_port=0,
                args=sim_args(engines),
            )
        )
        await engine.start(lambda events: None)
        sampling = SamplingParams(max_tokens=osl, min_tokens=osl, ignore_eos=True)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            prompt = array("I", rng.choices(range(1000, 40_000), k=isl))
            over = asyncio.Event()
            first = 0.0

            def hear(output: EngineOutput, over: asyncio.Event = over) -> None:
                nonlocal first
                first = first or time.perf_counter()
                if output.finish is not None:
                    over.set()

            asked = time.perf_counter()
            engine.submit(EngineRequest(str(len(found)), prompt, sampling), hear)
            async with asyncio.timeout(10):
                await over.wait()
            found.append(1e3 * (first - asked))
            await asyncio.sleep(_REST_S)
        await engine.stop()
    return found


def measured(*, isl: int, osl: int, seconds: float = 2.0) -> dict[str, float]:
    """p50 and p99, by a process of its own."""
    shape = ["--isl", str(isl), "--osl", str(osl), "--seconds", str(seconds)]
    command = [sys.executable, "-m", "bench.serve.engine_alone", *shape]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isl", type=int, default=128)
    parser.add_argument("--osl", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    collect_rarely()
    times = sorted(uvloop.run(ttft_ms(Engines("zero"), **vars(options))))
    print(json.dumps({"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}))


if __name__ == "__main__":
    main()
