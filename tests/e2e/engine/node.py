"""A process with one vLLM engine, as a worker's is, driven over a unix socket by JSON lines.

-> {"prompt": [ids], "max_tokens": n, "produce": bool, "handoff": [id, engine, tokens, params] | null}
<- {"tokens": [ids], "transferred_bytes": n | null, "handoff": ... | null}
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from tandem.core.types import SamplingParams
from tandem.engine.factory import make_engine
from tandem.engine.protocol import EngineConfig, EngineOutput, EngineRequest, KvHandoff


def config(worker: str, folder: str, model: str) -> EngineConfig:
    return EngineConfig(
        engine="vllm", model_path=model, served_model="m", worker_id=worker, run_dir=folder, disaggregated=True,
        max_model_len=2048, block_size=32, dtype="float32", kv_lease_s=20.0, kv_host="127.0.0.1", kv_port=0,
        args={"kv_cache_memory_bytes": 16 << 20},
    )  # fmt: skip


async def _run(engine: Any, number: int, job: dict[str, Any]) -> dict[str, Any]:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    outputs: list[EngineOutput] = []

    def sink(output: EngineOutput) -> None:
        outputs.append(output)
        if output.finish is not None:
            done.set_result(None)

    given = job.get("handoff")
    handoff = None if given is None else KvHandoff(given[0], given[1], given[2], given[3].encode())
    sampling = SamplingParams(max_tokens=job["max_tokens"], temperature=0.0, ignore_eos=True)
    produce = job.get("produce", False)
    engine.submit(EngineRequest(str(number), job["prompt"], sampling, produce_handoff=produce, handoff=handoff), sink)
    await asyncio.wait_for(done, 60)
    made = outputs[-1].handoff
    return {
        "tokens": [token for output in outputs for token in output.token_ids],
        "transferred_bytes": next((o.transferred_bytes for o in outputs if o.transferred_bytes), None),
        "handoff": None if made is None else [made.handoff_id, made.engine_id, made.num_tokens, made.params.decode()],
    }


async def _serve() -> None:
    worker, folder, model = os.environ["NODE_WORKER"], os.environ["NODE_FOLDER"], os.environ["NODE_MODEL"]
    engine = make_engine(config(worker, folder, model))
    await engine.start(lambda events: None)
    count = iter(range(1_000_000))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(json.dumps(await _run(engine, next(count), json.loads(line))).encode() + b"\n")
            await writer.drain()

    server = await asyncio.start_unix_server(answer, f"{folder}/{worker}.sock", limit=1 << 20)
    async with server:
        await engine.dead.wait()


def main() -> None:
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
