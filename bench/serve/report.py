"""From runs to a table of medians, and the goals as ratios: each round's own ratio first, then their median."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.serve.load import Run


@dataclass(frozen=True)
class Record:
    round: int
    stack: str
    cell: str
    run: Run

    def as_json(self) -> dict[str, Any]:
        return {"round": self.round, "stack": self.stack, "cell": self.cell, **_rounded(asdict(self.run))}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


Reading = Callable[[Run], float]


def routing_cpu(run: Run) -> float:
    """Frontend and router: Dynamo's frontend is both."""
    return run.cpu_ms["frontend"] + run.cpu_ms.get("router", 0.0)


def stores_cpu(run: Run) -> float:
    return run.cpu_ms.get("nats", 0.0) + run.cpu_ms.get("redis", 0.0)


COLUMNS: list[tuple[str, Reading, str]] = [
    ("req/s", lambda r: r.requests_per_s, ".0f"),
    ("tok/s", lambda r: r.tokens_per_s, ".0f"),
    ("TTFT p50", lambda r: r.ttft_ms.get("p50", float("nan")), ".2f"),
    ("p99", lambda r: r.ttft_ms.get("p99", float("nan")), ".2f"),
    ("e2e p50", lambda r: r.end_to_end_ms.get("p50", float("nan")), ".2f"),
    ("p99", lambda r: r.end_to_end_ms.get("p99", float("nan")), ".2f"),
    ("ITL mean", lambda r: r.itl_ms.get("mean", float("nan")), ".2f"),
    ("p99", lambda r: r.itl_ms.get("p99", float("nan")), ".2f"),
    ("frontend", lambda r: r.cpu_ms["frontend"], ".3f"),
    ("router", lambda r: r.cpu_ms.get("router", float("nan")), ".3f"),
    ("nats+redis", stores_cpu, ".3f"),
    ("workers", lambda r: r.cpu_ms["workers"], ".3f"),
    ("cached", lambda r: r.cached_share, ".3f"),
    ("others", lambda r: r.others_cores, ".2f"),
]


def table(records: Sequence[Record]) -> str:
    """Markdown; medians over the rounds."""
    titles = ["cell", "stack", *(title for title, _, _ in COLUMNS), "failed"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for cell in _in_order(record.cell for record in records):
        for stack in _in_order(record.stack for record in records if record.cell == cell):
            runs = [record.run for record in records if (record.cell, record.stack) == (cell, stack)]
            values = [f"{statistics.median(map(read, runs)):{form}}".replace("nan", "") for _, read, form in COLUMNS]
            lines.append(f"| {cell} | {stack} | " + " | ".join([*values, str(sum(run.failed for run in runs))]) + " |")
    return "\n".join(lines)


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Goal:
    """``value`` of ours, or ours over the other's, and the bound that it is to keep."""

    text: str
    cell: str
    read: Reading
    bound: float
    at_least: bool = False
    ours: str = "tandem"
    over: str = "dynamo"  # "" = the value itself
    difference: bool = False

    def value(self, records: Sequence[Record]) -> float | None:
        """Median over the rounds; None if the run did not go there."""
        mine = {record.round: self.read(record.run) for record in records if self._is(record, self.ours)}
        if not self.over:
            return statistics.median(mine.values()) if mine else None
        theirs = {record.round: self.read(record.run) for record in records if self._is(record, self.over)}
        both = sorted(mine.keys() & theirs.keys())
        if not both:
            return None
        pairs = [(mine[number], theirs[number]) for number in both]
        return statistics.median(a - b if self.difference else a / b if b else float("inf") for a, b in pairs)

    def _is(self, record: Record, stack: str) -> bool:
        return (record.cell, record.stack) == (self.cell, stack)

    def line(self, value: float) -> str:
        good = value >= self.bound if self.at_least else value <= self.bound
        sign = ">=" if self.at_least else "<="
        return f"| {self.text} | {self.cell} | {value:.3f} | {sign} {self.bound:g} | {'yes' if good else '**no**'} |"


def _rate(run: Run) -> float:
    return run.requests_per_s


def _spread(run: Run) -> float:
    return run.ttft_ms["p99"] / max(1e-6, run.ttft_ms["p50"])


def _added(run: Run, quantile: str) -> float:
    """To the TTFT of the engine by itself: to its median, since the tails of the two are of different requests."""
    return run.ttft_ms[quantile] - run.engine_ttft_ms["p50"]


SHORT, LONG = "zero 128/32 c64", "zero 1024/128 c64"
GOALS: list[Goal] = [
    Goal("CPU of frontend + router, over Dynamo's frontend", SHORT, routing_cpu, 0.25),
    Goal("CPU of frontend + router, over Dynamo's frontend", "zero 128/32 c256", routing_cpu, 0.25),
    Goal("CPU of frontend + router, over Dynamo's frontend", LONG, routing_cpu, 0.15),
    Goal("CPU of frontend + router, over Dynamo's frontend", "zero 1024/128 c256", routing_cpu, 0.15),
    Goal("the same with HF's tokenizers", LONG, routing_cpu, 0.65, ours="tandem-hf"),
    *(
        Goal("the same, steps of 10 ms at equal concurrency", f"paced {shape} c{concurrency}{client}", routing_cpu, 0.4)
        for shape in ("128/32", "1024/128")
        for concurrency in (64, 256)
        for client in ("", " ordinary")
    ),
    *(
        Goal("the same, steps of 10 ms at equal requests/s", f"paced {load}/s", routing_cpu, 0.4)
        for load in ("128/32 150", "128/32 250", "1024/128 30", "1024/128 60")
    ),
    Goal("requests/s of the whole stack, over Dynamo's", SHORT, _rate, 4.0, at_least=True),
    Goal("requests/s of the whole stack, over Dynamo's", LONG, _rate, 5.0, at_least=True),
    Goal("the same with HF's tokenizers", LONG, _rate, 1.2, at_least=True, ours="tandem-hf"),
    *(
        Goal("TTFT p99 over its p50", f"zero {shape} c{concurrency}", _spread, 5.0, over="")
        for shape in ("128/32", "1024/128")
        for concurrency in (1, 16, 64, 256)
    ),
    Goal("added latency p50, ms", "zero 128/32 c1 ordinary", lambda r: _added(r, "p50"), 2.0, over=""),
    Goal("added latency p99, ms", "zero 128/32 c1 ordinary", lambda r: _added(r, "p99"), 5.0, over=""),
    *(
        goal
        for cell in ("prefix prefixes 20/s", "prefix chats 4/s")
        for goal in (
            Goal("cached share, minus Dynamo's", cell, lambda r: r.cached_share, 0.02, at_least=True, difference=True),
            Goal("TTFT mean, over Dynamo's", cell, lambda r: r.ttft_ms["mean"], 1.0),
            Goal("TTFT p99, over Dynamo's", cell, lambda r: r.ttft_ms["p99"], 1.0),
        )
    ),
]


def goals(records: Sequence[Record]) -> str:
    lines = ["| goal | cell | measured | bound | met |", "|---|---|---|---|---|"]
    lines += [goal.line(value) for goal in GOALS if (value := goal.value(records)) is not None]
    return "\n".join(lines)
