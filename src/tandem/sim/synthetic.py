"""Workloads made from a seed: the shapes that a real trace has, where none is at hand."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping
from math import log
from types import MappingProxyType

from tandem.errors import ConfigError
from tandem.sim.workload import Chains, Offered, Workload


def smooth_chat(seed: int, count: int = 5000, rate: float = 20.0) -> Workload:
    """Poisson arrivals, prompts of about 1,000 tokens, outputs of about 250, nothing shared."""
    rng = random.Random(seed)
    clock = 0.0
    requests = []
    for _ in range(count):
        clock += rng.expovariate(rate)
        requests.append(Offered(clock, _lognormal(rng, 800, 0.7, 8000), _lognormal(rng, 220, 0.5, 1000)))
    return Workload("smooth-chat", 64, tuple(requests))


def shared_prefix(seed: int, count: int = 1000, rate: float = 20.0) -> Workload:
    """50 prefixes of 1,000 to 2,000 tokens, each asked with 96 tokens of its own, 64 tokens out; Poisson arrivals."""
    rng = random.Random(seed)
    block, groups = 16, 50
    prefixes = [rng.randint(1000, 2000) // block for _ in range(groups)]
    order = [i % groups for i in range(count)]
    rng.shuffle(order)
    chains = Chains()
    clock = 0.0
    requests = []
    for i, group in enumerate(order):
        clock += rng.expovariate(rate)
        blocks: list[object] = [(group, n) for n in range(prefixes[group])]
        blocks += [("own", i, n) for n in range(6)]
        requests.append(Offered(clock, len(blocks) * block, 64, tuple(chains.chain(blocks))))
    return Workload("shared-prefix", block, tuple(requests))


def multi_turn(seed: int, count: int = 5000, rate: float = 20.0) -> Workload:
    """Conversations of about six turns under one of 16 long system prompts; each turn repeats all before it.

    A turn follows the last one's answer (at a nominal 30 ms a token) after a think time of about 20 s.
    """
    rng = random.Random(seed)
    block = 64
    chains = Chains()
    start = 0.0
    turns: list[tuple[float, int]] = []
    talks: list[list[object]] = []  # blocks said so far, per conversation
    lengths: list[int] = []
    requests: list[Offered] = []
    while len(requests) < count:
        while not turns or turns[0][0] > start:
            start += rng.expovariate(rate / 6.0)
            system = rng.randrange(16)
            talks.append([("system", system, n) for n in range(16 + 4 * system)])
            lengths.append(len(talks[-1]) * block)
            heapq.heappush(turns, (start, len(talks) - 1))
        at, talk = heapq.heappop(turns)
        isl = lengths[talk] + _lognormal(rng, 150, 0.8, 4000)
        osl = _lognormal(rng, 220, 0.5, 1000)
        lengths[talk] = isl + osl
        while len(talks[talk]) < lengths[talk] // block:
            talks[talk].append((talk, len(talks[talk])))
        requests.append(Offered(at, isl, osl, tuple(chains.chain(talks[talk]))))
        if rng.random() < 5.0 / 6.0 and lengths[talk] < 30_000:
            heapq.heappush(turns, (at + 0.03 * osl + rng.expovariate(1.0 / 20.0), talk))
    return Workload("multi-turn", block, tuple(sorted(requests, key=lambda request: request.arrival_s)))


def long_context(seed: int, count: int = 5000, rate: float = 4.0) -> Workload:
    """The shape of Mooncake's conversation trace: long, heavy-tailed prompts, a third of whose blocks are shared."""
    rng = random.Random(seed)
    block = 512
    chains = Chains()
    documents: list[list[object]] = []
    clock = 0.0
    requests = []
    for i in range(count):
        clock += rng.expovariate(rate)
        isl = _lognormal(rng, 6900, 1.05, 126_000)
        blocks = isl // block
        known = (
            documents[rng.randrange(max(0, len(documents) - 600), len(documents))] if rng.random() < 0.6 and i else []
        )
        shared = min(blocks, int(len(known) * (0.4 + 0.6 * rng.random())))
        said = [*known[:shared], *(("own", i, n) for n in range(shared, blocks))]
        documents.append(said)
        requests.append(Offered(clock, isl, _lognormal(rng, 320, 0.5, 2000), tuple(chains.chain(said))))
    return Workload("long-context", block, tuple(requests))


def bursty_code(seed: int, count: int = 5000, rate: float = 4.0) -> Workload:
    """The shape of Azure's code trace: prompts of about 2,000 tokens, outputs of a dozen, arrivals in bursts."""
    rng = random.Random(seed)
    clock = 0.0
    requests: list[Offered] = []
    while len(requests) < count:
        busy = rng.random() < 0.3
        until = clock + rng.expovariate(1.0 / 20.0)
        pace = rate * (2.4 if busy else 0.4)
        while clock < until and len(requests) < count:
            clock += rng.expovariate(pace)
            requests.append(Offered(clock, _lognormal(rng, 1470, 0.9, 7437), _lognormal(rng, 13, 1.1, 1899)))
    return Workload("bursty-code", 64, tuple(requests))


def fixed(seed: int, count: int = 1000, rate: float = 10.0, isl_tokens: int = 3000, osl_tokens: int = 300) -> Workload:
    """Poisson arrivals of requests of one size, nothing shared."""
    rng = random.Random(seed)
    clock = 0.0
    requests = []
    for _ in range(count):
        clock += rng.expovariate(rate)
        requests.append(Offered(clock, isl_tokens, osl_tokens))
    return Workload("fixed", 16, tuple(requests))


GENERATORS: Mapping[str, Callable[..., Workload]] = MappingProxyType(
    {
        "smooth-chat": smooth_chat,
        "shared-prefix": shared_prefix,
        "multi-turn": multi_turn,
        "long-context": long_context,
        "bursty-code": bursty_code,
        "fixed": fixed,
    }
)


def generate(name: str, seed: int, count: int | None = None, rate: float | None = None) -> Workload:
    """ConfigError if there is no such generator."""
    if name not in GENERATORS:
        raise ConfigError(f"no workload {name!r}; there are {', '.join(GENERATORS)}", param="workload")
    workload = GENERATORS[name](seed) if count is None else GENERATORS[name](seed, count)
    return workload if rate is None else workload.at_rate(rate)


def _lognormal(rng: random.Random, median: float, sigma: float, most: int) -> int:
    return max(1, min(most, round(rng.lognormvariate(log(median), sigma))))
