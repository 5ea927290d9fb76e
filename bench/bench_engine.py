"""Real vLLM on this machine: what disaggregation is worth, what Tandem adds to a bare engine, and how fast KV moves.

    python bench/bench_engine.py [--seconds 40] [--chunks 128 256 512 1024] [--parts disagg overhead transfer]

*disagg*: four streams decode while prompts of 4,000 tokens keep arriving; ITL of the streams and TTFT of the prompts,
on one prefill and one decode worker, and on two aggregated workers at each chunk size (``max_num_batched_tokens``),
behind the same frontend and router. *overhead*: one client, TTFT and ITL through Tandem over those of a bare engine
of the same options in this process. *transfer*: KV bytes over the seconds of their transfer, as the workers report
them, with TCP alone and with shared memory (``UCX_TLS``). Prints tables; writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.serve.load import chat, words
from tandem.adapters.embedded import free_port
from tandem.models.prepare import resolve_model
from tandem.telemetry import metric_table as table

MODEL = "SmolLM2-135M-Instruct"
STREAMS, LONG_TOKENS, LONG_OSL = 4, 4000, 8
BARE_ENV = {
    "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"
}  # fmt: skip
#: What the model's chat template puts before the user's message.
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TCP, SHARED = "tcp,self", "posix,cma,self,tcp"


@contextlib.contextmanager
def tandem(pools: list[dict[str, Any]], folder: Path, dtype: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """The URL of a cluster of real engines."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    port = free_port()
    model = {"name": MODEL, "path": MODEL, "max_model_len": 8192, "dtype": dtype, "pools": pools}
    deployment = {"cluster": "bench", "http": {"port": port}, "grpc": {"port": free_port()}, "models": [model]}
    deployment["console"] = {"enabled": False}
    # What is measured is the split itself: each phase stays with the worker whose role it is.
    deployment["policy"] = {"local_prefill": False}
    (folder / "d.yaml").write_text(yaml.safe_dump(deployment))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
    places = {"XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder)}
    command = [sys.executable, "-m", "tandem.cli.main", "up", "-f", str(folder / "d.yaml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=inherited | places | (env or {}), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 300
        while "Tandem is ready" not in (folder / "log").read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text(errors="replace")[-3000:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def pool(role: str, replicas: int = 1, **args: Any) -> dict[str, Any]:
    return {"role": role, "replicas": replicas, "engine_args": {"kv_cache_memory_bytes": 512 << 20, **args}}


class Client:
    def __init__(self, url: str, vocabulary: list[str], seed: int) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=600)
        self._vocabulary = vocabulary
        self._rng = random.Random(seed)

    async def arrivals(self, isl: int, osl: int) -> AsyncIterator[float]:
        """Seconds from the request to each event with text."""
        text = " ".join(self._rng.choices(self._vocabulary, k=isl - 30))
        body = chat(MODEL, [{"role": "user", "content": text}], osl)
        began = time.perf_counter()
        async with self._http.stream("POST", "/v1/chat/completions", content=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    yield time.perf_counter() - began


async def mixed(url: str, vocabulary: list[str], seconds: float) -> dict[str, Any]:
    """Four streams all the time, and beside them one long prompt after the other."""
    gaps: list[float] = []
    firsts: list[float] = []
    client = Client(url, vocabulary, 1)
    [_ async for _ in client.arrivals(64, 4)]
    end = time.monotonic() + seconds

    async def stream(number: int) -> None:
        mine = Client(url, vocabulary, 100 + number)
        while time.monotonic() < end:
            last = None
            async for at in mine.arrivals(100, 256):
                if last is not None:
                    gaps.append(at - last)
                last = at
                if time.monotonic() > end:
                    break

    async def prompts() -> None:
        mine = Client(url, vocabulary, 7)
        await asyncio.sleep(2)
        while time.monotonic() < end:
            times = [at async for at in mine.arrivals(LONG_TOKENS, LONG_OSL)]
            firsts.append(times[0])

    await asyncio.gather(*(stream(i) for i in range(STREAMS)), prompts())
    return {"itl_ms": _summary(gaps), "ttft_ms": _summary(firsts), "tokens": len(gaps), "prompts": len(firsts)}


async def alone(url: str, vocabulary: list[str], requests: int = 8) -> dict[str, Any]:
    client = Client(url, vocabulary, 3)
    [_ async for _ in client.arrivals(128, 8)]
    firsts, gaps = [], []
    for _ in range(requests):
        times = [at async for at in client.arrivals(128, 48)]
        firsts.append(times[0])
        gaps += [b - a for a, b in itertools.pairwise(times)]
    return {"ttft_ms": _summary(firsts), "itl_ms": _summary(gaps)}


def bare(vocabulary: list[str], dtype: str, requests: int = 8) -> dict[str, Any]:
    """vLLM by itself, in a process of its own: what Tandem sets on a CPU, no frontend, router, bus or worker."""
    words_file = json.dumps(vocabulary[:2000])
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_engine", "--bare", str(requests), "--dtype", dtype],
        input=words_file, capture_output=True, text=True, check=False, timeout=400,
        env=os.environ | BARE_ENV,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


async def _bare(requests: int, dtype: str) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from tandem.engine.vllm_start import multiplies_bf16

    vocabulary = json.loads(sys.stdin.read())
    folder = str(resolve_model(MODEL))
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=folder,
            max_model_len=8192,
            dtype="float32" if dtype == "auto" and not multiplies_bf16() else dtype,
            kv_cache_memory_bytes=512 << 20,
            block_size=32,
            max_num_batched_tokens=256,
            enforce_eager=True,
        )
    )
    sampling = SamplingParams(max_tokens=48, min_tokens=48, ignore_eos=True)
    rng = random.Random(3)
    firsts, gaps = [], []
    for number in range(requests + 1):
        text = " ".join(rng.choices(vocabulary, k=98))
        prompt = f"{SYSTEM}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        began = last = time.perf_counter()
        count = 0
        async for _ in engine.generate(prompt, sampling, uuid.uuid4().hex):
            now = time.perf_counter()
            if number and not count:
                firsts.append(now - began)
            elif number:
                gaps.append(now - last)
            last, count = now, count + 1
    print(json.dumps({"ttft_ms": _summary(firsts), "itl_ms": _summary(gaps)}))
    engine.shutdown()


async def transfers(url: str, vocabulary: list[str], prompts: int = 8) -> None:
    client = Client(url, vocabulary, 11)
    for _ in range(prompts):
        [_ async for _ in client.arrivals(LONG_TOKENS, 4)]


def rate_of(folder: Path) -> dict[str, float]:
    """From the decode workers' counters."""
    seconds_name = table.KV_SECONDS.name
    totals = dict.fromkeys((table.KV_BYTES.name, f"{seconds_name}_sum", f"{seconds_name}_count"), 0.0)
    for state in folder.glob("*/tandem/*/state.json"):
        for process in json.loads(state.read_bytes())["processes"]:
            if process["kind"] != "decode" or not process.get("metrics"):
                continue
            for line in httpx.get(f"http://{process['metrics']}/metrics").text.splitlines():
                name, _, value = line.rpartition(" ")
                if name.partition("{")[0] in totals:
                    totals[name.partition("{")[0]] += float(value)
    sent, seconds, count = totals.values()
    return {"transfers": count, "megabytes": sent / 1e6, "megabytes_per_s": sent / 1e6 / seconds if seconds else 0.0}


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(1e3 * value for value in values)
    if not ordered:
        return {}
    pick = {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 2) for p in (50, 99)}
    return pick | {"mean": round(statistics.fmean(ordered), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", type=float, default=40, help="of each mixed run")
    add("--chunks", type=int, nargs="*", default=[128, 256, 512, 1024])
    add("--parts", nargs="*", default=["disagg", "overhead", "transfer"])
    add("--dtype", default="auto", help="of weights and KV; auto: bfloat16 where this CPU has instructions for it")
    add("--output", type=Path, default=Path("build/bench-engine.json"))
    add("--bare", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        asyncio.run(_bare(options.bare, options.dtype))
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = words(resolve_model(MODEL) / "tokenizer.json")
    found: dict[str, Any] = {"load_average": os.getloadavg()}

    def keep(name: str, value: dict[str, Any]) -> None:
        found[name] = value
        print(name, json.dumps(value), flush=True)
        options.output.write_text(json.dumps(found, indent=1))

    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        if "disagg" in options.parts:
            with tandem([pool("prefill"), pool("decode")], folder, options.dtype) as url:
                keep("1 prefill + 1 decode", asyncio.run(mixed(url, vocabulary, options.seconds)))
            for chunk in options.chunks:
                with tandem([pool("aggregated", 2, max_num_batched_tokens=chunk)], folder, options.dtype) as url:
                    keep(f"2 aggregated, chunk {chunk}", asyncio.run(mixed(url, vocabulary, options.seconds)))
        if "overhead" in options.parts:
            keep("bare engine", bare(vocabulary, options.dtype))
            with tandem([pool("aggregated")], folder, options.dtype) as url:
                keep("through Tandem", asyncio.run(alone(url, vocabulary)))
        if "transfer" in options.parts:
            for tls in (TCP, SHARED):
                place = Path(tempfile.mkdtemp(dir=folder))
                with tandem([pool("prefill"), pool("decode")], place, options.dtype, {"UCX_TLS": tls}) as url:
                    asyncio.run(transfers(url, vocabulary))
                    keep(f"KV transfer, UCX_TLS={tls}", rate_of(place))
    print(f"All of it: {options.output}")


if __name__ == "__main__":
    main()
