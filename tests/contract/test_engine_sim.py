"""What the simulated engine promises beyond the engine port: token identity over every way a request can run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tandem.core.types import FinishReason, SamplingParams
from tandem.engine.protocol import EngineConfig, EngineOutput, EngineRequest, KvEvent, KvHandoff
from tandem.engine.sim import SimEngine
from tandem.errors import ConfigError, ContextLengthExceeded, HandoffFailed, InternalError

BLOCK = 16
PROMPT = tuple(range(100, 150))  # three full blocks and a bit
LONG_S = 20.0
_ROOT = Path(__file__).parents[2]


def config(**args: object) -> EngineConfig:
    lease_s = float(str(args.pop("lease_s", 30.0)))
    defaults: dict[str, object] = {"speedup": 0, "kv_blocks": 64, "token_range": [1000, 2000]}
    return EngineConfig(
        engine="sim", model_path="", served_model="m", worker_id="w", run_dir="", disaggregated=True,
        max_model_len=512, block_size=BLOCK, dtype="bfloat16", kv_lease_s=lease_s, kv_host="127.0.0.1", kv_port=0,
        args=defaults | args,
    )  # fmt: skip


@dataclass
class Collected:
    """A sink that can be awaited."""

    outputs: list[EngineOutput] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, output: EngineOutput) -> None:
        assert not self.ended.is_set(), "news after the end"
        self.outputs.append(output)
        if output.finish is not None:
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    async def end(self) -> EngineOutput:
        async with asyncio.timeout(LONG_S):
            await self.ended.wait()
        return self.outputs[-1]


class Engines:
    """Starts engines and stops them all."""

    def __init__(self) -> None:
        self.started: list[SimEngine] = []
        self.events: dict[SimEngine, list[KvEvent]] = {}

    async def start(self, **args: object) -> SimEngine:
        engine = SimEngine(config(**args))
        self.events[engine] = []
        await engine.start(self.events[engine].extend)
        self.started.append(engine)
        return engine


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    engines = Engines()
    yield engines
    for engine in engines.started:
        await engine.stop()


def request(request_id: str, prompt: Sequence[int] = PROMPT, **kw: object) -> EngineRequest:
    sampling = {"max_tokens": 40} | {k: kw.pop(k) for k in list(kw) if k in SamplingParams.__struct_fields__}
    return EngineRequest(request_id, prompt, SamplingParams(**sampling), **kw)  # type: ignore[arg-type]


async def run(engine: SimEngine, req: EngineRequest) -> Collected:
    sink = Collected()
    engine.submit(req, sink)
    await sink.end()
    return sink


async def handoff_of(engine: SimEngine, prompt: Sequence[int] = PROMPT) -> KvHandoff:
    done = await run(engine, request("p", prompt, produce_handoff=True))
    handoff = done.outputs[-1].handoff
    assert handoff is not None and done.tokens == []
    return handoff


async def test_local_remote_and_migrated_runs_say_the_same(engines: Engines) -> None:
    p, d, other = [await engines.start() for _ in range(3)]
    local = (await run(other, request("a"))).tokens
    assert len(local) == 40 and all(1000 <= token < 2000 for token in local)

    remote = await run(d, request("a", handoff=await handoff_of(p)))
    assert remote.tokens == local
    assert remote.outputs[0].cached_tokens == 0 and remote.outputs[0].transferred_bytes
    async with asyncio.timeout(LONG_S):
        while p.stats().kv_blocks_used:  # noqa: ASYNC110 - the consumer tells the producer that it is done
            await asyncio.sleep(0.001)

    migrated = await run(other, request("b", (*PROMPT, *local[:13]), max_tokens=27))
    assert migrated.tokens == local[13:]


async def test_what_steps_without_duration_say_does_not_wait_for_one_that_has_none(engines: Engines) -> None:
    """A prompt of no cost: its first token leaves before the decode steps, which take time, and none is lost."""
    free = {"p0": 0.0, "p1": 0.0, "p2": 0.0, "p3": 0.0}
    expected = (await run(await engines.start(), request("a"))).tokens
    engine = await engines.start(speedup=1.0, terms=free)
    assert (await run(engine, request("a"))).tokens == expected
    long = Collected()
    engine.submit(request("long", PROMPT[::-1], max_tokens=400), long)
    assert len((await run(engine, request("short", PROMPT[1:], max_tokens=1))).tokens) == 1
    assert not any(output.finish for output in long.outputs), "it did not have to wait for the long one's end"


async def test_a_second_remote_run_finds_the_blocks_cached_and_lets_the_producer_go(engines: Engines) -> None:
    p, d = [await engines.start() for _ in range(2)]
    prompt = PROMPT[:48]  # full blocks only
    first = await run(d, request("a", prompt, handoff=await handoff_of(p, prompt)))
    again = await run(d, request("b", prompt, handoff=replace(await handoff_of(await engines.start(), prompt))))
    assert again.tokens == first.tokens
    assert again.outputs[0].transferred_bytes is None


async def test_reading_after_the_lease_gives_wrong_tokens_and_is_counted(engines: Engines) -> None:
    p, d, other = await engines.start(kv_blocks=33), await engines.start(), await engines.start()
    local = (await run(other, request("a"))).tokens
    handoff = await handoff_of(p)
    p.release_handoff(handoff.handoff_id, pulled=False)
    for i in range(12):  # overwrite the blocks
        await run(p, request(f"x{i}", range(1, 60 + i)))
    late = await run(d, request("a", handoff=handoff))
    assert late.tokens != local
    assert p.stats().reads_after_expiry == 1
    poisoned = await run(d, request("b"))
    assert poisoned.outputs[0].cached_tokens and poisoned.tokens != local
    await d.reset_prefix_cache()
    assert (await run(d, request("c"))).tokens == local


async def test_a_lease_ends_by_itself(engines: Engines) -> None:
    p = await engines.start(lease_s=0.2)
    handoff = await handoff_of(p)
    left = p.claim_handoff(handoff.handoff_id, handoff.engine_id)
    assert left is not None and 0 < left <= 0.2
    assert p.claim_handoff(handoff.handoff_id, "another life") is None
    assert p.stats().open_handoffs == 1 and p.stats().kv_blocks_used == 4
    await asyncio.sleep(0.3)
    assert p.claim_handoff(handoff.handoff_id, handoff.engine_id) is None
    assert p.stats().kv_blocks_used == 0


async def test_a_dead_producer_means_recomputing(engines: Engines) -> None:
    p, d, other = [await engines.start() for _ in range(3)]
    handoff = await handoff_of(p)
    await p.stop()
    got = await run(d, request("a", handoff=handoff))
    assert got.tokens == (await run(other, request("a"))).tokens
    assert got.outputs[0].transferred_bytes is None


_PRODUCER = """
import asyncio, sys
from tests.contract.test_engine_sim import config, handoff_of
from tandem.engine.sim import SimEngine
async def main():
    engine = SimEngine(config())
    await engine.start(lambda events: None)
    handoff = await handoff_of(engine)
    print(handoff.handoff_id, handoff.engine_id, handoff.num_tokens, handoff.params.decode(), sep="|", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_a_hung_producer_holds_the_pull_until_abort_or_death(engines: Engines) -> None:
    d, other = [await engines.start() for _ in range(2)]
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", textwrap.dedent(_PRODUCER)], stdout=subprocess.PIPE, text=True, cwd=_ROOT
    )
    try:
        assert process.stdout is not None
        fields = (await asyncio.to_thread(process.stdout.readline)).strip().split("|")
        handoff = KvHandoff(fields[0], fields[1], int(fields[2]), fields[3].encode())
        os.kill(process.pid, signal.SIGSTOP)
        aborted, recomputed = Collected(), Collected()
        d.submit(request("a", handoff=handoff), aborted)
        d.submit(request("b", handoff=handoff), recomputed)
        assert (await run(d, request("c", range(1, 20)))).tokens  # others go on
        assert not aborted.outputs and not recomputed.outputs
        d.abort("a")
        assert (await aborted.end()).finish is FinishReason.ABORT
        process.kill()
        await recomputed.end()
        assert recomputed.tokens == (await run(other, request("a"))).tokens
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert d.stats().kv_blocks_used == 0


async def test_a_handoff_that_does_not_fit_is_refused_and_the_engine_lives(engines: Engines) -> None:
    p, d = [await engines.start() for _ in range(2)]
    good = await handoff_of(p)
    for bad in (replace(good, num_tokens=3), replace(good, params=b"{}"), replace(good, params=b"\xff")):
        end = (await run(d, request("a", handoff=bad))).outputs[-1]
        assert end.finish is FinishReason.ERROR and isinstance(end.error, HandoffFailed)
    assert len((await run(d, request("b"))).tokens) == 40


async def test_abort_at_each_stage_frees_everything(engines: Engines) -> None:
    engine = await engines.start(speedup=1, step_s=0.02)
    for stage in range(4):
        sink = Collected()
        engine.submit(request(f"r{stage}", max_tokens=200), sink)
        await asyncio.sleep(0.015 * stage)
        engine.abort(f"r{stage}")
        engine.abort(f"r{stage}")
        assert (await sink.end()).finish is FinishReason.ABORT
        assert engine.stats().kv_blocks_used == 0
    engine.abort("never heard of")


async def test_stop_tokens_min_tokens_and_eos(engines: Engines) -> None:
    engine = await engines.start(eos_token_id=2, mean_osl=10)
    free = await run(engine, request("a", max_tokens=300))
    assert free.outputs[-1].finish is FinishReason.STOP and free.tokens[-1] == 2
    assert free.outputs[-1].stop_token_id is None
    going = await run(engine, request("b", max_tokens=50, ignore_eos=True))
    assert len(going.tokens) == 50 and going.outputs[-1].finish is FinishReason.LENGTH
    later = await run(engine, request("c", max_tokens=300, min_tokens=len(free.tokens) + 5))
    assert len(later.tokens) >= len(free.tokens) + 5
    third = going.tokens[2]
    stopped = await run(engine, request("d", max_tokens=50, ignore_eos=True, stop_token_ids=(third,)))
    assert stopped.tokens == going.tokens[:3] and stopped.outputs[-1].stop_token_id == third


async def test_seed_and_lora_change_the_tokens_and_salt_does_not(engines: Engines) -> None:
    engine = await engines.start()
    plain = (await run(engine, request("a"))).tokens
    assert (await run(engine, request("b", cache_salt="s"))).tokens == plain
    assert (await run(engine, request("c", seed=1))).tokens != plain
    assert (await run(engine, request("d", lora="l"))).tokens != plain


async def test_logprobs_have_the_engine_ports_shape(engines: Engines) -> None:
    engine = await engines.start()
    done = await run(engine, request("a", max_tokens=3, logprobs=4, prompt_logprobs=2))
    for output in done.outputs:
        assert output.logprobs is not None
        assert [candidates[0][0] for candidates in output.logprobs] == list(output.token_ids)
        assert all([rank for _, _, rank in candidates] == [1, 2, 3, 4] for candidates in output.logprobs)
    prompt = done.outputs[0].prompt_logprobs
    assert prompt is not None and len(prompt) == len(PROMPT) and prompt[0] is None
    assert all(output.prompt_logprobs is None for output in done.outputs[1:])


async def test_timings_and_time(engines: Engines) -> None:
    engine = await engines.start(speedup=1, step_s=0.01, max_num_seqs=8, max_batched_tokens=32)
    began = asyncio.get_running_loop().time()
    await run(engine, request("a", max_tokens=10))
    assert asyncio.get_running_loop().time() - began >= 0.1  # two steps of prefill, nine of decode
    timings = engine.take_step_timings()
    assert [t.prefill_tokens for t in timings] == [32, 18] + [0] * 9
    assert timings[1].prefill_context_tokens == sum(range(32, 50))
    assert [t.kv_tokens for t in timings[2:]] == list(range(51, 60))
    assert engine.take_step_timings() == []
    assert engine.stats().steps == 11


async def test_an_id_can_be_used_once_at_a_time(engines: Engines) -> None:
    engine = await engines.start()
    first, second = Collected(), Collected()
    engine.submit(request("a"), first)
    engine.submit(request("a"), second)
    assert isinstance((await second.end()).error, InternalError)
    await first.end()
    assert len(first.tokens) == 40


async def test_wrong_options_are_a_config_error() -> None:
    for args in ({"nonsense": 1}, {"profile": "abacus"}, {"kv_blocks": 2}, {"speedup": -1}, {"terms": {"q": 1}}):
        with pytest.raises(ConfigError):
            SimEngine(config(**args))


async def test_a_prompt_that_does_not_fit_is_refused(engines: Engines) -> None:
    engine = await engines.start()
    end = (await run(engine, request("a", range(512)))).outputs[-1]
    assert isinstance(end.error, ContextLengthExceeded)
