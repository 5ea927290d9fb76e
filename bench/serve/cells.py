"""What is measured: phases (which engines stand behind the stacks) and in each the cells that every stack goes through.

A cell's prompts are new in every round, and the same for all stacks of that round: repeated prompts flatter whoever
caches them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from bench.serve.load import Line, chat, prompts
from bench.serve.stacks import Engines

ZERO = Engines("zero")
#: So much KV cache that its use, on which the mocker's steps depend, stays near nothing.
PACED = Engines("paced", step_s=0.010, kv_blocks=262_144)
#: Four workers, none of which can hold all prefixes; together they can.
SMALL_CACHES = Engines("prefix", workers=4, step_s=None, kv_blocks=3072, block_size=16)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """``concurrency`` 0: an open loop at ``rate`` requests/s, or as the ``workload`` says."""

    engines: Engines
    isl: int = 0
    osl: int = 0
    concurrency: int = 0
    rate: float = 0.0
    seconds: float = 2.0
    #: Enough for the fastest stack: nobody sees a prompt twice.
    count: int = 0
    quick_ack: bool = True
    stream: bool = True
    workload: str = ""
    hf_too: bool = False

    @property
    def name(self) -> str:
        shape = self.workload or (f"{self.isl}/{self.osl}" + ("" if self.stream else " unary"))
        load = f"c{self.concurrency}" if self.concurrency else f"{self.rate:g}/s"
        return f"{self.engines.name} {shape} {load}" + ("" if self.quick_ack else " ordinary")

    def lines(self, model: str, vocabulary: Sequence[str], round_number: int) -> list[Line]:
        seed = zlib.crc32(f"{self.name} {round_number}".encode())
        if self.workload:
            return WORKLOADS[self.workload](model, vocabulary, seed)
        count = self.count or int(self.rate * self.seconds)
        return prompts(
            model,
            vocabulary,
            isl=self.isl,
            osl=self.osl,
            count=count,
            seed=seed,
            stream=self.stream,
            rate=self.rate,
        )


def shared_prefixes(model: str, vocabulary: Sequence[str], seed: int, rate: float = 20.0) -> list[Line]:
    """50 groups of 20 requests, shuffled: a prefix of 1,000 to 2,000 tokens a group, 100 of each request's own."""
    rng = random.Random(seed)
    prefixes = [_words(vocabulary, rng.randint(1000, 2000), rng) for _ in range(50)]
    order = [group for group in range(50) for _ in range(20)]
    rng.shuffle(order)
    lines, at = [], 0.0
    for group in order:
        at += rng.expovariate(rate)
        text = prefixes[group] + _words(vocabulary, 100, rng)
        lines.append(Line(chat(model, [{"role": "user", "content": text}], 64), int(at * 1e6)))
    return lines


def conversations(model: str, vocabulary: Sequence[str], seed: int, rate: float = 4.0) -> list[Line]:
    """80 chats of 6 turns: one of 8 system prompts of 512 tokens, 150 user tokens a turn, the answers scripted."""
    rng = random.Random(seed)
    systems = [_words(vocabulary, 512, rng) for _ in range(8)]
    lines: list[Line] = []
    at = 0.0
    for number in range(80):
        at += rng.expovariate(rate)
        messages = [{"role": "system", "content": systems[number % 8]}]
        for turn in range(6):
            messages = [*messages, {"role": "user", "content": _words(vocabulary, 150, rng)}]
            delay = rng.expovariate(1.0) if turn else at
            lines.append(Line(chat(model, messages, 100), int(delay * 1e6), len(lines) - 1 if turn else -1))
            messages = [*messages, {"role": "assistant", "content": _words(vocabulary, 100, rng)}]
    return lines


def _words(vocabulary: Sequence[str], count: int, rng: random.Random) -> str:
    return "".join(" " + word for word in rng.choices(vocabulary, k=count))


WORKLOADS = {"prefixes": shared_prefixes, "chats": conversations}


def _grid(
    engines: Engines, isl: int, osl: int, counts: dict[int, int], *, stream: bool = True, seconds: float = 2.0
) -> list[Cell]:
    return [
        Cell(
            engines=engines,
            isl=isl,
            osl=osl,
            concurrency=concurrency,
            count=count,
            seconds=seconds,
            stream=stream,
            quick_ack=quick_ack,
            hf_too=quick_ack and concurrency == 64 and engines is ZERO and stream,
        )
        for concurrency, count in counts.items()
        for quick_ack in (True, False)
    ]


ALL: list[Cell] = [
    *_grid(ZERO, 128, 32, {1: 3000, 16: 14_000, 64: 16_000, 256: 16_000}),
    *_grid(ZERO, 1024, 128, {1: 1200, 16: 4000, 64: 5000, 256: 5000}),
    *_grid(ZERO, 8000, 200, {1: 200, 16: 800}),
    *_grid(ZERO, 64, 8, {1: 4000, 64: 20_000}, stream=False),
    *_grid(PACED, 128, 32, {1: 50, 16: 300, 64: 1200, 256: 4500}, seconds=4),
    *_grid(PACED, 1024, 128, {1: 10, 16: 100, 64: 400, 256: 1500}, seconds=6),
    # The same in an open loop, with some 48 and 80, 38 and 77 in flight: nobody waits for anybody else's end.
    *(Cell(engines=PACED, isl=128, osl=32, rate=rate, seconds=5) for rate in (150, 250)),
    *(Cell(engines=PACED, isl=1024, osl=128, rate=rate, seconds=6) for rate in (30, 60)),
    Cell(engines=SMALL_CACHES, workload="prefixes", rate=20, seconds=120),
    Cell(engines=SMALL_CACHES, workload="chats", rate=4, seconds=120),
]

QUICK: list[Cell] = [
    Cell(engines=ZERO, isl=128, osl=32, concurrency=1, count=1500, quick_ack=False, seconds=1),
    Cell(engines=ZERO, isl=128, osl=32, concurrency=64, count=12_000, seconds=1.5, hf_too=True),
    Cell(engines=ZERO, isl=1024, osl=128, concurrency=64, count=4000, seconds=1.5, hf_too=True),
    Cell(engines=PACED, isl=128, osl=32, rate=150, seconds=3),
]
