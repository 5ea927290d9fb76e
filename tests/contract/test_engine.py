"""The engine port's contract, over the simulated engine and over vLLM with a tiny random model.

Two engines, P and D, of each kind, in this process (vLLM's cores are children). float32, so that greedy tokens do not
depend on how the work was cut. What needs a process to be stopped or killed runs on vLLM alone, at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs

from tandem.core.types import FinishReason, SamplingParams, StructuredOutput
from tandem.engine.factory import make_engine
from tandem.engine.protocol import (
    AllBlocksCleared,
    BlocksRemoved,
    BlocksStored,
    Engine,
    EngineConfig,
    EngineOutput,
    EngineRequest,
    KvEvent,
    KvHandoff,
)
from tandem.errors import ContextLengthExceeded, EngineFailed, HandoffFailed, InternalError, InvalidRequest

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

BLOCK = 32
LEASE_S = 6.0
DEADLINE_S = 30.0
MAX_LEN = 2048


@dataclass
class Collected:
    """A sink that can be awaited and that checks the contract: exactly one end, nothing after it."""

    outputs: list[EngineOutput] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    ended_at: float = 0.0

    def __call__(self, output: EngineOutput) -> None:
        assert not self.ended.is_set(), "news after the end"
        self.outputs.append(output)
        if output.finish is not None:
            self.ended_at = time.monotonic()
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def cached_tokens(self) -> int | None:
        return next((o.cached_tokens for o in self.outputs if o.cached_tokens is not None), None)

    @property
    def transferred_bytes(self) -> int | None:
        return next((o.transferred_bytes for o in self.outputs if o.transferred_bytes is not None), None)

    async def end(self) -> EngineOutput:
        async with asyncio.timeout(DEADLINE_S):
            await self.ended.wait()
        return self.outputs[-1]


@dataclass
class Unit:
    """An engine and what it said of its cache; ``core`` is the pid of vLLM's child."""

    engine: Engine
    events: list[KvEvent] = field(default_factory=list)
    core: int = 0


@dataclass
class Pair:
    kind: str
    p: Unit
    d: Unit
    count: int = 0

    def prompt(self, tokens: int) -> list[int]:
        """One that no test had before."""
        self.count += 1
        return [100 + (self.count * 7919 + i * 104729) % 40000 for i in range(tokens)]

    def vllm_only(self) -> None:
        if self.kind != "vllm":
            pytest.skip("needs a process of its own, or what only vLLM has")


def _config(kind: str, name: str, folder: Path) -> EngineConfig:
    args: dict[str, object] = {"speedup": 20.0, "kv_blocks": 512, "token_range": [1000, 2000]}
    path = ""
    if kind == "vllm":
        from tandem.models.prepare import prepare_tiny

        path = str(prepare_tiny(progress=lambda _: None))
        args = {"kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 16}  # 512 blocks
    return EngineConfig(
        engine=kind, model_path=path, served_model="m", worker_id=name, run_dir=str(folder), disaggregated=True,
        max_model_len=MAX_LEN, block_size=BLOCK, dtype="float32", kv_lease_s=LEASE_S, kv_host="127.0.0.1", kv_port=0,
        args=args,
    )  # fmt: skip


def _cores() -> set[int]:
    """EngineCores among this process's descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = int(stat.parent.name), stat.read_text()
            parents[pid] = (int(rest.rsplit(")", 1)[1].split()[1]), rest)
    return {pid for pid, (parent, stat) in parents.items() if parent == os.getpid() and "(VLLM::" in stat}


async def _start(kind: str, name: str, folder: Path) -> Unit:
    unit = Unit(make_engine(_config(kind, name, folder)))
    before = _cores()
    await unit.engine.start(unit.events.extend)
    unit.core = next(iter(_cores() - before), 0)
    return unit


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["sim", "vllm"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    kind = request.param
    if kind == "vllm":
        pytest.importorskip("vllm")
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        p = await _start(kind, "p", Path(folder, "p"))
        d = await _start(kind, "d", Path(folder, "d"))
        assert kind != "vllm" or (p.core and d.core)
        yield Pair(kind, p, d)
        for unit in (p, d):
            await unit.engine.stop()
    os.environ.clear()
    os.environ.update(environment)


GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
_ids = iter(range(1_000_000))


def greedy(**changes: Any) -> SamplingParams:
    return structs.replace(GREEDY, **changes)


def submit(
    engine: Engine, prompt: Sequence[int], sampling: SamplingParams = GREEDY, **more: Any
) -> tuple[str, Collected]:
    request_id, sink = f"r,{next(_ids)}:x", Collected()
    engine.submit(EngineRequest(request_id, prompt, sampling, **more), sink)
    return request_id, sink


async def run(engine: Engine, prompt: Sequence[int], sampling: SamplingParams = GREEDY, **more: Any) -> Collected:
    _, sink = submit(engine, prompt, sampling, **more)
    end = await sink.end()
    assert end.finish in (FinishReason.STOP, FinishReason.LENGTH), end.error
    return sink


async def refused(engine: Engine, prompt: Sequence[int], sampling: SamplingParams = GREEDY, **more: Any) -> Exception:
    _, sink = submit(engine, prompt, sampling, **more)
    end = await sink.end()
    assert end.finish is FinishReason.ERROR and end.error is not None and not sink.tokens
    return end.error


async def handoff_of(engine: Engine, prompt: Sequence[int], sampling: SamplingParams = GREEDY) -> KvHandoff:
    done = await run(engine, prompt, sampling, produce_handoff=True)
    handoff = done.outputs[-1].handoff
    assert handoff is not None and done.tokens == []
    return handoff


async def until(condition: Callable[[], bool], what: str, within_s: float = DEADLINE_S) -> float:
    """Seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, what
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def all_free(pair: Pair) -> None:
    for unit in (pair.p, pair.d):
        await until(lambda unit=unit: unit.engine.stats().kv_blocks_used == 0, "blocks are free")  # type: ignore[misc]


# -- requests ---


async def test_info_tells_what_registration_needs(pair: Pair) -> None:
    p, d = pair.p.engine.info, pair.d.engine.info
    assert p.engine_id != d.engine_id and p.kv_endpoint != d.kv_endpoint
    assert (p.engine, p.block_size, p.max_model_len, p.dtype) == (pair.kind, BLOCK, MAX_LEN, "float32")
    assert (p.kv_layout, p.engine_version, p.kv_bytes_per_token) == (
        d.kv_layout,
        d.engine_version,
        d.kv_bytes_per_token,
    )
    assert p.kv_blocks_total * BLOCK >= MAX_LEN and p.kv_bytes_per_token > 0 and p.max_batched_tokens > 0
    if pair.kind == "vllm":
        assert p.kv_bytes_per_token == 2 * 2 * 32 * 4  # layers, keys and values, one head of 32, float32


async def test_a_request_ends_once_and_greedy_repeats(pair: Pair) -> None:
    prompt = pair.prompt(100)
    first = await run(pair.p.engine, prompt)
    assert len(first.tokens) == 10 and first.outputs[-1].finish is FinishReason.LENGTH
    assert first.cached_tokens == 0
    again = await run(pair.p.engine, prompt)
    assert again.tokens == first.tokens and again.cached_tokens == 96
    await all_free(pair)


async def test_many_at_once_say_what_each_says_alone(pair: Pair) -> None:
    prompts = [pair.prompt(20 + 40 * i) for i in range(8)]
    alone = [(await run(pair.d.engine, prompt)).tokens for prompt in prompts]
    sinks = [submit(pair.p.engine, prompt)[1] for prompt in prompts]
    for sink, tokens in zip(sinks, alone, strict=True):
        await sink.end()
        assert sink.tokens == tokens


async def test_abort(pair: Pair) -> None:
    engine = pair.p.engine
    for wait_for_token in (False, True):
        request_id, sink = submit(engine, pair.prompt(200), greedy(max_tokens=1500))
        if wait_for_token:
            await until(lambda sink=sink: bool(sink.tokens), "first token")  # type: ignore[misc]
        engine.abort(request_id)
        engine.abort(request_id)
        assert (await sink.end()).finish is FinishReason.ABORT
        await until(lambda: engine.stats().kv_blocks_used == 0, "blocks are free")
        engine.abort(request_id)
    engine.abort("never heard of")
    assert len((await run(engine, pair.prompt(10))).tokens) == 10


async def test_what_cannot_run_is_refused_and_the_engine_lives(pair: Pair) -> None:
    engine = pair.d.engine
    assert isinstance(await refused(engine, range(1, MAX_LEN + 1)), ContextLengthExceeded)
    request_id, sink = submit(engine, pair.prompt(50), greedy(max_tokens=1000))
    twice = Collected()
    engine.submit(EngineRequest(request_id, pair.prompt(10), GREEDY), twice)
    assert isinstance((await twice.end()).error, InternalError)
    engine.abort(request_id)
    await sink.end()
    if pair.kind == "vllm":
        assert isinstance(await refused(engine, pair.prompt(5), greedy(top_p=7.0)), InvalidRequest)
        bad = StructuredOutput(json_schema="{nonsense")
        assert isinstance(await refused(engine, pair.prompt(5), greedy(structured_output=bad)), InvalidRequest)
        assert isinstance(await refused(engine, pair.prompt(5), lora="nobody"), InvalidRequest)
    assert len((await run(engine, pair.prompt(10))).tokens) == 10


async def test_stopping(pair: Pair) -> None:
    prompt = pair.prompt(40)
    free = (await run(pair.p.engine, prompt)).tokens
    at = next(i for i in range(2, 10) if free[i] not in free[:i])
    stopped = await run(pair.p.engine, prompt, greedy(stop_token_ids=(free[at],)))
    assert stopped.tokens == free[: at + 1]
    assert stopped.outputs[-1].finish is FinishReason.STOP and stopped.outputs[-1].stop_token_id == free[at]
    later = await run(pair.p.engine, prompt, greedy(stop_token_ids=(free[at],), min_tokens=at + 2))
    assert len(later.tokens) >= at + 2


async def test_seed_and_salt(pair: Pair) -> None:
    prompt = pair.prompt(64)
    drawn = [
        (await run(pair.p.engine, prompt, SamplingParams(max_tokens=8, seed=seed, ignore_eos=True))).tokens
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    salted = await run(pair.p.engine, prompt, cache_salt="tenant")
    assert salted.cached_tokens == 0  # another tenant's blocks are not read
    assert (await run(pair.p.engine, prompt, cache_salt="tenant")).cached_tokens == 32


async def test_logprobs(pair: Pair) -> None:
    prompt = pair.prompt(20)
    done = await run(pair.p.engine, prompt, greedy(max_tokens=3, logprobs=4, prompt_logprobs=2))
    for output in done.outputs:
        if output.token_ids:
            assert output.logprobs is not None
            for token, candidates in zip(output.token_ids, output.logprobs, strict=True):
                assert candidates[0][0] == token and candidates[0][2] == 1  # greedy: the best comes first
                assert len(candidates) == 4 and all(logprob <= 0 for _, logprob, _ in candidates)
    of_prompt = next(o.prompt_logprobs for o in done.outputs if o.prompt_logprobs is not None)
    assert len(of_prompt) == 20 and of_prompt[0] is None
    assert of_prompt[1] is not None and of_prompt[1][0][0] == prompt[1]


async def test_sampling_that_only_a_real_engine_has(pair: Pair) -> None:
    pair.vllm_only()
    engine, prompt = pair.p.engine, pair.prompt(30)
    forced = await run(engine, prompt, greedy(logit_bias=((777, 100.0),)))
    assert forced.tokens == [777] * 10
    varied = await run(engine, prompt, greedy(logit_bias=((777, 100.0),), presence_penalty=2.0, max_tokens=3))
    assert varied.tokens == [777] * 3  # a penalty of 2 does not outweigh 100, and is accepted
    narrow = await run(engine, prompt, SamplingParams(max_tokens=10, min_p=1.0, ignore_eos=True))
    assert narrow.tokens == (await run(engine, prompt)).tokens  # min_p 1 leaves the best token only
    wanted = StructuredOutput(regex="[0-7]{6}")
    digits = await run(engine, prompt, greedy(structured_output=wanted, ignore_eos=False))
    assert digits.outputs[-1].finish is FinishReason.STOP
    from tokenizers import Tokenizer

    from tandem.models.prepare import models_dir

    tokenizer = Tokenizer.from_file(str(models_dir() / "tiny" / "tokenizer.json"))
    text = tokenizer.decode(digits.tokens)  # without the end-of-sequence token
    assert len(text) == 6 and set(text) <= set("01234567")


async def test_stats_and_timings(pair: Pair) -> None:
    engine = pair.d.engine
    engine.take_step_timings()
    steps = engine.stats().steps
    prompt = pair.prompt(700)
    _, sink = submit(engine, prompt, greedy(max_tokens=6))
    assert engine.stats().pending_prefill_tokens == 700 and engine.stats().waiting_requests == 1
    assert engine.stats().pending_prefill_context_tokens == 700 * 699 // 2
    await sink.end()
    await until(lambda: engine.stats().running_requests == 0, "the last step is told")
    stats, timings = engine.stats(), engine.take_step_timings()
    assert stats.pending_prefill_tokens == stats.waiting_requests == stats.kv_tokens == stats.open_handoffs == 0
    assert stats.last_step_age_s < 5 and stats.reads_after_expiry == 0
    prefills = [t for t in timings if t.prefill_tokens]
    assert sum(t.prefill_tokens for t in prefills) == 700
    assert sum(t.prefill_context_tokens for t in prefills) == 700 * 699 // 2
    assert [t.kv_tokens for t in timings if t.decode_sequences] == [701, 702, 703, 704, 705]
    assert all(0 < t.duration_s < 10 for t in timings)
    assert stats.steps - steps == len(timings) and engine.take_step_timings() == []


# -- handoffs ---


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 500, 1100])
async def test_a_handoff_gives_the_tokens_of_a_local_run(pair: Pair, tokens: int) -> None:
    prompt = pair.prompt(tokens)
    handoff = await handoff_of(pair.p.engine, prompt, greedy(min_tokens=5, logprobs=2, prompt_logprobs=1))
    assert handoff.num_tokens == tokens and handoff.engine_id == pair.p.engine.info.engine_id
    assert pair.p.engine.stats().open_handoffs == 1
    assert pair.p.engine.stats().kv_blocks_used == -(-tokens // BLOCK)
    remote = await run(pair.d.engine, prompt, handoff=handoff, handoff_valid_s=LEASE_S / 2)
    pair.p.engine.release_handoff(handoff.handoff_id, pulled=True)
    await until(lambda: pair.p.engine.stats().kv_blocks_used == 0, "the producer's blocks are free", 5.0)
    assert pair.p.engine.stats().open_handoffs == 0
    local = await run(pair.p.engine, prompt)
    assert remote.tokens == local.tokens
    assert remote.cached_tokens == 0 and local.cached_tokens == (tokens - 1) // BLOCK * BLOCK
    if tokens > 1:
        assert remote.transferred_bytes
    await all_free(pair)


async def test_either_engine_can_be_either_side(pair: Pair) -> None:
    prompt = pair.prompt(150)
    handoff = await handoff_of(pair.d.engine, prompt)
    remote = await run(pair.p.engine, prompt, handoff=handoff)
    assert remote.transferred_bytes
    assert remote.tokens == (await run(pair.d.engine, prompt)).tokens
    await all_free(pair)


async def test_only_what_is_missing_is_pulled(pair: Pair) -> None:
    prompt = pair.prompt(320)
    await run(pair.d.engine, prompt[:160])
    partly = await run(pair.d.engine, prompt, handoff=await handoff_of(pair.p.engine, prompt))
    assert partly.cached_tokens == 160
    whole = 320 * pair.d.engine.info.kv_bytes_per_token
    assert partly.transferred_bytes is not None and 0 < partly.transferred_bytes <= whole // 2 + whole // 10
    fully = await run(pair.d.engine, prompt, handoff=await handoff_of(pair.p.engine, prompt))
    assert not fully.transferred_bytes or fully.transferred_bytes < whole // 4
    assert partly.tokens == fully.tokens == (await run(pair.p.engine, prompt)).tokens
    await all_free(pair)


async def test_several_handoffs_at_once(pair: Pair) -> None:
    prompts = [pair.prompt(90 + 50 * i) for i in range(6)]
    handoffs = await asyncio.gather(*(handoff_of(pair.p.engine, prompt) for prompt in prompts))
    remote = await asyncio.gather(
        *(run(pair.d.engine, prompt, handoff=h) for prompt, h in zip(prompts, handoffs, strict=True))
    )
    for prompt, sink in zip(prompts, remote, strict=True):
        assert sink.tokens == (await run(pair.p.engine, prompt)).tokens
    await all_free(pair)


async def test_a_handoff_that_does_not_fit_is_refused_and_the_engine_lives(pair: Pair) -> None:
    prompt = pair.prompt(100)
    good = await handoff_of(pair.p.engine, prompt)
    bad = [replace(good, num_tokens=3), replace(good, params=b"{}"), replace(good, params=b"\xff")]
    if pair.kind == "vllm":
        fields = json.loads(good.params)
        [ids] = fields["remote_block_ids"]
        for wrong in (ids[:-1], [*ids, 400], ids[::-1][:1] * 4, [0, *ids[1:]], [10**6, *ids[1:]]):
            bad.append(replace(good, params=json.dumps(fields | {"remote_block_ids": [wrong]}).encode()))
        bad.append(replace(good, engine_id="another"))
    for handoff in bad:
        assert isinstance(await refused(pair.d.engine, prompt, handoff=handoff), HandoffFailed)
    remote = await run(pair.d.engine, prompt, handoff=good)
    assert remote.tokens == (await run(pair.p.engine, prompt)).tokens
    await all_free(pair)


async def test_release_frees_at_once(pair: Pair) -> None:
    engine = pair.p.engine
    handoffs = [await handoff_of(engine, pair.prompt(200)) for _ in range(3)]
    assert engine.stats().kv_blocks_used == 3 * 7 and engine.stats().open_handoffs == 3
    for handoff in handoffs:
        engine.release_handoff(handoff.handoff_id, pulled=False)
        engine.release_handoff(handoff.handoff_id, pulled=False)
    assert await until(lambda: engine.stats().kv_blocks_used == 0, "blocks are free") < 1.0
    assert engine.claim_handoff(handoffs[0].handoff_id, handoffs[0].engine_id) is None
    engine.release_handoff("never heard of", pulled=False)
    assert len((await run(engine, pair.prompt(10))).tokens) == 10
    assert engine.stats().reads_after_expiry == 0


async def test_a_cancelled_prefill_leaves_nothing(pair: Pair) -> None:
    """Whenever the abort comes: before, in the middle, at the end, when the handoff is already on its way."""
    engine = pair.p.engine
    for i in range(24):
        request_id, sink = submit(engine, pair.prompt(300), produce_handoff=True)
        await asyncio.sleep(0.002 * i)
        engine.abort(request_id)
        end = await sink.end()
        if end.handoff is not None:
            engine.release_handoff(end.handoff.handoff_id, pulled=False)
        else:
            assert end.finish is FinishReason.ABORT
    assert await until(lambda: engine.stats().kv_blocks_used == 0, "blocks are free") < 1.0
    assert engine.stats().open_handoffs == 0


async def test_a_cancelled_pull_leaves_nothing(pair: Pair) -> None:
    for i in range(12):
        prompt = pair.prompt(600)
        handoff = await handoff_of(pair.p.engine, prompt)
        request_id, sink = submit(pair.d.engine, prompt, greedy(max_tokens=1000), handoff=handoff)
        await asyncio.sleep(0.003 * i)
        pair.d.engine.abort(request_id)
        assert (await sink.end()).finish is FinishReason.ABORT
        pair.p.engine.release_handoff(handoff.handoff_id, pulled=False)  # the shell's, whatever the engines said
        await until(lambda: pair.p.engine.stats().kv_blocks_used == 0, "the producer's blocks are free", 1.0)
    await all_free(pair)
    if pair.kind == "vllm":
        assert pair.p.engine.stats().reads_after_expiry == 0
    prompt = pair.prompt(100)
    remote = await run(pair.d.engine, prompt, handoff=await handoff_of(pair.p.engine, prompt))
    assert remote.transferred_bytes


async def test_claims_and_the_leases_end(pair: Pair) -> None:
    engine, prompt = pair.p.engine, pair.prompt(100)
    handoff = await handoff_of(engine, prompt)
    left = engine.claim_handoff(handoff.handoff_id, handoff.engine_id)
    assert left is not None and LEASE_S - 3 < left < LEASE_S
    assert engine.claim_handoff(handoff.handoff_id, "another life") is None
    assert engine.claim_handoff("never heard of", handoff.engine_id) is None
    assert pair.d.engine.claim_handoff(handoff.handoff_id, handoff.engine_id) is None
    await until(lambda: engine.claim_handoff(handoff.handoff_id, handoff.engine_id) is None, "the claim ends")
    assert await until(lambda: engine.stats().kv_blocks_used == 0, "blocks are free") < 2.0
    before = engine.stats().reads_after_expiry
    await run(pair.d.engine, prompt, handoff=handoff)  # nobody told this reader how long it may
    await run(engine, pair.prompt(10))  # vLLM looks for news from readers with its steps only
    await until(lambda: engine.stats().reads_after_expiry == before + 1, "the producer notices")
    await pair.d.engine.reset_prefix_cache()


async def test_urgent_requests_come_first(pair: Pair) -> None:
    sinks = [
        submit(pair.d.engine, pair.prompt(1500), greedy(max_tokens=1), priority=priority)[1] for priority in (5, 5, -1)
    ]
    for sink in sinks:
        await sink.end()
    assert sinks[2].ended_at < sinks[1].ended_at


async def test_a_promise_that_has_passed_is_not_read(pair: Pair) -> None:
    prompt = pair.prompt(200)
    handoff = await handoff_of(pair.p.engine, prompt)
    late = await run(pair.d.engine, prompt, handoff=handoff, handoff_valid_s=0.0)
    pair.p.engine.release_handoff(handoff.handoff_id, pulled=False)
    assert not late.transferred_bytes
    assert late.tokens == (await run(pair.p.engine, prompt)).tokens
    await all_free(pair)


# -- KV events ---


def _cached(events: Sequence[KvEvent]) -> dict[Any, tuple[Any, tuple[int, ...]]]:
    """hash -> (parent, tokens) after ``events``; asserts that no block came before its parent."""
    blocks: dict[Any, tuple[Any, tuple[int, ...]]] = {}
    for event in events:
        match event:
            case BlocksStored():
                assert len(event.token_ids) == BLOCK * len(event.block_hashes)
                assert event.parent_hash is None or event.parent_hash in blocks
                parent = event.parent_hash
                for i, key in enumerate(event.block_hashes):
                    blocks[key] = (parent, tuple(event.token_ids[i * BLOCK : (i + 1) * BLOCK]))
                    parent = key
            case BlocksRemoved():
                for key in event.block_hashes:
                    blocks.pop(key, None)
            case AllBlocksCleared():
                blocks.clear()
    return blocks


async def test_kv_events_tell_the_cache(pair: Pair) -> None:
    await all_free(pair)
    for unit in (pair.p, pair.d):
        await unit.engine.reset_prefix_cache()
        await until(lambda unit=unit: not _cached(unit.events), "the cache is cleared")  # type: ignore[misc]
        assert isinstance(unit.events[-1], AllBlocksCleared)
        unit.events.clear()
    prompt = pair.prompt(150)
    await run(pair.d.engine, prompt, handoff=await handoff_of(pair.p.engine, prompt), cache_salt="")
    for unit in (pair.p, pair.d):  # computed here, pulled there: cached on both
        await until(lambda unit=unit: len(_cached(unit.events)) >= 4, "four full blocks")  # type: ignore[misc]
        chain: list[int] = []
        parent = None
        blocks = _cached(unit.events)
        for _ in range(4):
            key = next(key for key, (above, tokens) in blocks.items() if above == parent)
            chain.extend(blocks[key][1])
            parent = key
        assert chain == prompt[:128]
    pair.p.events.clear()
    await run(pair.p.engine, pair.prompt(40), cache_salt="tenant")
    await until(lambda: bool(pair.p.events), "an event")
    stored = pair.p.events[0]
    assert isinstance(stored, BlocksStored) and stored.cache_salt == "tenant" and stored.parent_hash is None
    await all_free(pair)


async def test_the_cache_can_be_reset_under_a_running_request(pair: Pair) -> None:
    prompt = pair.prompt(100)
    expected = (await run(pair.d.engine, prompt, greedy(max_tokens=200))).tokens
    _, sink = submit(pair.p.engine, prompt, greedy(max_tokens=200))
    await until(lambda: len(sink.tokens) > 3, "some tokens")
    await pair.p.engine.reset_prefix_cache()
    await sink.end()
    assert sink.tokens == expected
    await all_free(pair)


# -- faults, on vLLM's own processes; the last tests of the module, since they leave P dead ---


@contextlib.contextmanager
def stopped(pid: int) -> Any:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def test_a_hung_producer_costs_an_abort_and_nothing_else(pair: Pair) -> None:
    pair.vllm_only()
    prompt = pair.prompt(400)
    expected = (await run(pair.p.engine, prompt)).tokens
    handoff = await handoff_of(pair.p.engine, prompt)
    with stopped(pair.p.core):
        request_id, pulling = submit(pair.d.engine, prompt, handoff=handoff, handoff_valid_s=LEASE_S)
        assert len((await run(pair.d.engine, pair.prompt(50))).tokens) == 10, "others go on"
        await asyncio.sleep(1.0)
        assert not pulling.outputs
        assert pair.d.engine.stats().last_step_age_s < 1.0, "an engine that waits for KV is not a hung one"
        pair.d.engine.abort(request_id)
        assert (await pulling.end()).finish is FinishReason.ABORT
        assert (await run(pair.d.engine, prompt)).tokens == expected, "prefilled here instead"
    pair.p.engine.release_handoff(handoff.handoff_id, pulled=False)
    await all_free(pair)
    again = await run(pair.d.engine, longer := pair.prompt(200), handoff=await handoff_of(pair.p.engine, longer))
    assert again.transferred_bytes, "transfers work again"
    assert len((await run(pair.d.engine, prompt)).tokens) == 10
    await all_free(pair)


async def test_a_read_that_ends_after_the_promise_is_thrown_away(pair: Pair) -> None:
    """The producer hangs while it is read, and meanwhile the lease ends: what it then sends may be anything."""
    pair.vllm_only()
    prompt = pair.prompt(400)
    handoff = await handoff_of(pair.p.engine, prompt)
    with stopped(pair.p.core):
        _, pulling = submit(pair.d.engine, prompt, handoff=handoff, handoff_valid_s=LEASE_S / 2)
        await asyncio.sleep(LEASE_S / 2 + 0.5)
        assert not pulling.outputs, "the read began in time, and hangs"
    await pulling.end()
    assert pulling.transferred_bytes is None, "it was recomputed"
    assert pulling.tokens == (await run(pair.p.engine, prompt)).tokens
    await all_free(pair)


async def test_a_producer_that_dies_means_recomputing(pair: Pair) -> None:
    pair.vllm_only()
    prompt = pair.prompt(400)
    expected = (await run(pair.p.engine, prompt)).tokens
    handoffs = [await handoff_of(pair.p.engine, prompt) for _ in range(3)]
    with stopped(pair.p.core):
        aborted_id, aborted = submit(pair.d.engine, prompt, handoff=handoffs[0])
        _, pulling = submit(pair.d.engine, pair.prompt(1) + prompt[1:], handoff=handoffs[1])
        await asyncio.sleep(0.5)
        pair.d.engine.abort(aborted_id)
        await aborted.end()
        _, orphan = submit(pair.p.engine, pair.prompt(50))
        began = time.monotonic()
        os.kill(pair.p.core, signal.SIGKILL)
        await asyncio.wait_for(pair.p.engine.dead.wait(), 10)
        end = await orphan.end()
        assert end.finish is FinishReason.ERROR and isinstance(end.error, EngineFailed)
        assert time.monotonic() - began < 5.0
    assert isinstance(await refused(pair.p.engine, pair.prompt(5)), EngineFailed)
    assert (await pulling.end()).finish is FinishReason.LENGTH and len(pulling.tokens) == 10
    await until(lambda: pair.d.engine.stats().kv_blocks_used == 0, "blocks are free")
    late = await run(pair.d.engine, prompt, handoff=handoffs[2])
    assert late.tokens == expected
    assert not pair.d.engine.dead.is_set()
    await until(lambda: pair.d.engine.stats().kv_blocks_used == 0, "blocks are free")
