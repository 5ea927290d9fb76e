"""The engine model under random traffic: whatever happens, its books balance and every request ends once, rightly."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.profiles import Profile
from tandem.core.types import FinishReason, SamplingParams
from tandem.enginemodel.block_pool import CacheEvent, Stored
from tandem.enginemodel.content import HashContent, TokenContent, Vocabulary
from tandem.enginemodel.engine_model import EngineModel
from tandem.enginemodel.profile import context_sum
from tandem.enginemodel.sequence import ModelConfig, Phase, Sequence, StepResult
from tests.unit.enginemodel.test_block_pool import replay

PROFILE = Profile("test", 1e-2, 1e-4, 1e-8, 1e-7, 1e-2, 1e-4, 1e-7, source="test", relative_error=0.0)
WORDS = Vocabulary(range(100, 140))
BLOCK = 4


def sequence(request_id: str, prompt: list[int], max_tokens: int = 10, **kw: object) -> Sequence:
    content = TokenContent(prompt, SamplingParams(max_tokens=max_tokens), WORDS, BLOCK)
    return Sequence(request_id, content, max_tokens, **kw)  # type: ignore[arg-type]


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    """What the request says on an engine of its own."""
    content = TokenContent(prompt, SamplingParams(max_tokens=max_tokens), WORDS, BLOCK)
    return content.draw(0, max_tokens).tokens


@dataclass
class Driver:
    """Runs a model and keeps the books that it is checked against."""

    model: EngineModel
    #: Plain decodes, up to so many, are done together.
    at_once: int = 0
    now: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    finishes: Counter[str] = field(default_factory=Counter)
    pulls: list[str] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    parents: dict[int, int | None] = field(default_factory=dict)
    results: list[StepResult] = field(default_factory=list)

    def step(self) -> StepResult:
        config = self.model.config
        plain = self.model.plain_steps(self.at_once)
        result = self.model.run_quiet(plain, self.now) if plain else self.model.step(self.now)
        self.now += result.duration_s
        self.learn(result.events)
        self.pulls += [pull.request_id for pull in result.pulls]
        for output in result.outputs:
            request_id = output.sequence.request_id
            assert not self.finishes[request_id], "news after the end"
            if output.tokens:
                self.tokens.setdefault(request_id, []).extend(output.tokens)
            self.finishes[request_id] += output.finish is not None
        if result.timing is not None:
            assert result.timing.prefill_tokens + result.timing.decode_sequences <= config.max_batched_tokens
            assert result.timing.decode_sequences <= config.max_num_seqs
        self.results.append(result)
        self.check()
        return result

    def run(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.model.has_work:
                return
            self.step()
        raise AssertionError("the model does not come to an end")

    def learn(self, events: list[CacheEvent]) -> None:
        self.known = replay(events, self.known)
        for event in events:
            if isinstance(event, Stored):
                self.parents |= zip(event.hashes, [event.parent, *event.hashes], strict=False)
        assert all(self.parents[h] is None or self.parents[h] in self.known for h in self.known), "not prefix-closed"

    def check(self) -> None:
        model, pool = self.model, self.model.pool
        self.learn(pool.take_events())
        held = [s.blocks for s in model.sequences.values()] + [list(h.blocks) for h in model.handoffs.values()]
        held += [s.blocks for s in model.dropped()]
        uses = Counter(block for blocks in held for block in blocks)
        assert all(pool.refs(block) == uses[block] for block in range(pool.num_blocks))
        assert pool.num_used == len(uses)
        assert pool.cached_hashes() == self.known
        assert model.decode_kv_tokens == sum(s.length for s in model.decoding)
        assert model.num_running <= model.config.max_num_seqs
        for s in model.decoding:
            assert s.phase is Phase.DECODE and s.computed <= s.length


def driver(**kw: int) -> Driver:
    options = {"num_blocks": 32, "block_size": BLOCK, "max_num_seqs": 4, "max_batched_tokens": 8} | kw
    return Driver(EngineModel(ModelConfig(**options), PROFILE))  # type: ignore[arg-type]


@pytest.mark.parametrize("stops", [(), (107, 121)])
def test_plain_decodes_done_together_say_what_they_say_one_by_one(stops: tuple[int, ...]) -> None:
    """With room for some of them only, and, by ``stops``, ends that nobody can foresee. ``Driver.check`` keeps the
    books: blocks, cache and lengths after every call."""
    said = []
    for at_once in (0, 16):
        d, rng = driver(num_blocks=24), random.Random(7)
        d.at_once = at_once
        for number in range(12):
            prompt, most = [rng.randrange(50) for _ in range(rng.randint(1, 12))], rng.randint(1, 40)
            sampling = SamplingParams(max_tokens=most, stop_token_ids=stops)
            d.model.submit(Sequence(f"r{number}", TokenContent(prompt, sampling, WORDS, BLOCK), most))
        d.run()
        assert all(ends == 1 for ends in d.finishes.values()) and len(d.finishes) == 12
        said.append(d.tokens)
        assert any(result.steps > 1 for result in d.results) == bool(at_once)
    assert said[0] == said[1]


def test_chunked_prefill_beside_decodes() -> None:
    d = driver()
    d.model.submit(sequence("a", list(range(20)), 5))
    d.run()
    prefills = [r.timing.prefill_tokens for r in d.results if r.timing]
    assert prefills == [8, 8, 4, 0, 0, 0, 0]
    assert [r.timing.prefill_context_tokens for r in d.results[:3] if r.timing] == [
        context_sum(0, 8), context_sum(8, 8), context_sum(16, 4),
    ]  # fmt: skip
    assert d.tokens["a"] == alone(list(range(20)), 5)
    assert d.results[3].timing and d.results[3].timing.kv_tokens == 21


def test_the_last_prompt_token_is_always_computed() -> None:
    d = driver()
    for request_id in ("a", "b"):
        d.model.submit(sequence(request_id, list(range(8)), 1))
        d.run()
    computed = [r.timing.prefill_tokens for r in d.results if r.timing]
    assert computed == [8, 4]
    assert d.tokens["a"] == d.tokens["b"]


def test_priority_comes_first_and_the_lowest_is_preempted() -> None:
    d = driver(num_blocks=8, max_num_seqs=2)
    low = sequence("low", list(range(12)), 12, priority=5)
    d.model.submit(low)
    d.step()
    d.step()
    d.model.submit(sequence("also low", list(range(50, 62)), 4, priority=4))
    d.model.submit(sequence("high", list(range(30, 42)), 12, priority=0))
    d.run()
    assert low.preemptions > 0
    ends = [o.sequence.request_id for r in d.results for o in r.outputs if o.finish]
    assert ends.index("high") < ends.index("also low")
    assert d.tokens["low"] == alone(list(range(12)), 12)


def test_handoff_and_pull_give_the_local_tokens() -> None:
    p, d = driver(), driver()
    prompt = list(range(10))
    p.model.submit(sequence("x", prompt, produce_handoff=True))
    p.run()
    (handoff,) = p.model.handoffs.values()
    assert p.model.pool.num_used == 3
    d.model.submit(sequence("x", prompt, 6, remote=True))
    result = d.step()
    assert result.steps == 0 and result.pulls[0].num_blocks == 3 and not d.model.has_work
    d.model.pull_done("x", [p.model.pool.content[block] for block in handoff.blocks])
    d.run()
    assert d.tokens["x"] == alone(prompt, 6)
    assert all(r.timing.prefill_tokens == 0 for r in d.results if r.timing)
    p.model.expire_handoffs(p.now + 31.0)
    assert p.model.pool.num_used == 0 and p.model.claim_handoff("x", p.now) is None


def test_wrong_kv_is_wrong_for_good() -> None:
    d = driver()
    prompt = list(range(10))
    d.model.submit(sequence("x", prompt, 6, remote=True))
    d.step()
    d.model.pull_done("x", [1, 2, 3])
    d.run()
    d.model.submit(sequence("y", prompt, 6))
    d.run()
    right = alone(prompt, 6)
    assert d.tokens["x"] != right and d.tokens["y"] != right
    d.model.clear_cache()
    d.model.submit(sequence("z", prompt, 6))
    d.run()
    assert d.tokens["z"] == right


def test_blocks_of_an_aborted_pull_stay_until_it_lets_go() -> None:
    d = driver()
    d.model.submit(sequence("x", list(range(10)), remote=True))
    d.step()
    assert d.model.abort("x") and not d.model.abort("x")
    assert d.model.pool.num_used == 3
    d.model.pull_done("x", None)
    d.check()
    assert d.model.pool.num_used == 0


def test_a_failed_pull_recomputes() -> None:
    d = driver()
    d.model.submit(sequence("x", list(range(10)), 6, remote=True))
    d.step()
    d.model.pull_done("x", None)
    d.run()
    assert d.tokens["x"] == alone(list(range(10)), 6)
    assert d.results[1].timing and d.results[1].timing.prefill_tokens == 8


def test_pulled_requests_do_not_wait_behind_one_that_lacks_blocks() -> None:
    d = driver(num_blocks=8)
    d.model.submit(sequence("pulled", list(range(20)), 4, remote=True))
    d.step()
    d.model.submit(sequence("first", list(range(60, 84)), 4, priority=-1))
    d.step()
    d.model.pull_done("pulled", None)
    d.run()
    assert set(d.finishes) == {"pulled", "first"}


def test_context_ends_a_request_and_too_long_a_prompt_is_refused() -> None:
    d = driver(max_model_len=16)
    s = sequence("a", list(range(10)), 100)
    d.model.submit(s)
    d.run()
    assert len(d.tokens["a"]) == 6 and s.length == 16
    assert d.results[-1].outputs[0].finish is FinishReason.LENGTH
    with pytest.raises(ValueError):
        d.model.submit(sequence("b", list(range(16))))


def test_hash_content_tells_first_token_and_end_only() -> None:
    d = driver()
    for request_id in ("a", "b"):
        d.model.submit(Sequence(request_id, HashContent(10, (1, 2, 3)), 8))
        d.run()
    news = [(o.sequence.request_id, o.finish) for r in d.results for o in r.outputs]
    assert news == [("a", None), ("a", FinishReason.LENGTH), ("b", None), ("b", FinishReason.LENGTH)]
    assert d.known == {1, 2, 3}
    assert sum(r.timing.prefill_tokens for r in d.results if r.timing) == 10 + 2


OPS = ["submit", "submit", "produce", "remote", "abort", "pull", "fail", "release", "step", "step", "clear"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(OPS), max_size=80), st.integers(0, 2**20), st.integers(10, 24))
def test_random_traffic(program: list[str], seed: int, num_blocks: int) -> None:
    traffic(program, seed, num_blocks)


@pytest.mark.parametrize("seed", range(30))
def test_much_random_traffic(seed: int) -> None:
    rng = random.Random(seed)
    traffic([*rng.choices(OPS, k=200), *rng.choices(OPS + ["step"] * 20, k=100)], seed, rng.randint(10, 24))


def traffic(program: list[str], seed: int, num_blocks: int) -> None:
    rng = random.Random(seed)
    d = driver(num_blocks=num_blocks, max_model_len=36)
    asked: dict[str, tuple[list[int], int]] = {}
    aborted: set[str] = set()
    produced: set[str] = set()

    def end_pull(ok: bool) -> None:
        request_id = d.pulls.pop(rng.randrange(len(d.pulls)))
        live = d.model.sequences.get(request_id)
        right = live and d.model.expected_contents(live, live.hit_blocks)
        d.model.pull_done(request_id, right if ok and right else None)

    for op in [*program, "drain"]:
        if op in ("submit", "produce", "remote"):
            family = rng.randrange(3)
            prompt = [family * 40 + i for i in range(rng.randint(1, 24))]
            request_id = f"r{len(asked)}"
            asked[request_id] = (prompt, rng.randint(1, 12))
            s = sequence(
                request_id, *asked[request_id], priority=rng.randrange(3),
                produce_handoff=op == "produce", remote=op == "remote",
            )  # fmt: skip
            d.model.submit(s)
            if op == "produce":
                produced.add(request_id)
        elif op == "abort" and asked:
            request_id = rng.choice(sorted(asked))
            if d.model.abort(request_id):
                aborted.add(request_id)
        elif op in ("pull", "fail") and d.pulls:
            end_pull(op == "pull")
        elif op == "release" and d.model.handoffs:
            d.model.release_handoff(rng.choice(sorted(d.model.handoffs)))
        elif op == "clear":
            d.model.clear_cache()
        elif op == "step":
            d.step()
        elif op == "drain":
            for _ in range(500):
                while d.pulls:
                    end_pull(rng.random() < 0.5)
                if not d.model.has_work:
                    break
                if d.step().steps == 0:  # held up by handoffs
                    d.now = max(d.now, d.model.next_expiry() or 0.0)
        d.check()
    assert not d.model.sequences and not d.model.waiting()
    for request_id, (prompt, max_tokens) in asked.items():
        if request_id in aborted:
            assert not d.finishes[request_id]
            continue
        assert d.finishes[request_id] == 1
        expected = [] if request_id in produced else alone(prompt, min(max_tokens, 36 - len(prompt)))
        assert d.tokens.get(request_id, []) == expected
    d.model.expire_handoffs(d.now + 100)
    assert d.model.pool.num_used == 0


def test_the_same_traffic_gives_the_same_run() -> None:
    def once() -> list[StepResult]:
        rng, d = random.Random(5), driver(num_blocks=20)
        for i in range(20):
            d.model.submit(sequence(f"r{i}", [rng.randrange(3)] * rng.randint(1, 20), rng.randint(1, 9)))
            d.step()
        d.run()
        return d.results

    first, second = once(), once()
    assert [(r.duration_s, r.timing, r.events) for r in first] == [(r.duration_s, r.timing, r.events) for r in second]
