"""What tracing costs: CPU per request of every process, with tracing off, at 1 % and at 100 %.

    python -m bench.bench_tracing [--rounds 5] [--seconds 10] [--output FILE]

Real NATS and Redis, engines that compute nothing or take 10 ms a step, an open loop at the same rate for all, and a
collector that throws away what it gets, in a process that is not counted. All three are up at the same time and take
turns. CPU is the kernel's count over the run and one second more, in which the last spans leave.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from bench.serve import cells
from bench.serve.cells import Cell
from bench.serve.load import Generator, cpu_s, temporary_folder, words
from bench.serve.stacks import MODEL, Tandem
from tandem.models.prepare import resolve_model

#: What the table calls it, by OTEL_TRACES_SAMPLER_ARG; off: there is no collector.
SETTINGS = {"off": "off", "0.01": "1 %", "1.0": "100 %"}
#: Longer than any process waits before it sends its last batch.
SETTLE_S = 1.5


@dataclass(frozen=True)
class Result:
    cell: str
    setting: str
    requests: int
    cpu_ms: dict[str, float]
    spans: int
    ttft_p50_ms: float


class _Discard(trace_service_pb2_grpc.TraceServiceServicer):
    """Counts, and keeps nothing."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        number = sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        with self._counter.get_lock():
            self._counter.value += number
        return trace_service_pb2.ExportTraceServiceResponse()


def _collector(port: Any, counter: Any) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Discard(counter), server)
    port.value = server.add_insecure_port("127.0.0.1:0")
    server.start()
    server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of load in each round and setting")
    parser.add_argument("--output", type=Path, default=Path("build/bench-tracing.json"))
    options = parser.parse_args()
    shapes = [
        Cell(engines=cells.ZERO, isl=128, osl=32, rate=200, seconds=options.seconds),
        Cell(engines=cells.PACED, isl=128, osl=32, rate=100, seconds=options.seconds),
    ]
    results: list[Result] = []
    with temporary_folder() as folder, contextlib.ExitStack() as running:
        generator = Generator(Path(folder))
        context = get_context("spawn")
        port, counter = context.Value("i", 0), context.Value("q", 0)
        collector = context.Process(target=_collector, args=(port, counter), daemon=True)
        collector.start()
        running.callback(collector.kill)
        while not port.value:
            time.sleep(0.05)
        for cell in shapes:
            with contextlib.ExitStack() as up:
                stacks = [up.enter_context(_stack(cell, ratio, port.value, Path(folder))) for ratio in SETTINGS]
                for number in range(options.rounds):
                    results += _round(generator, cell, stacks, counter, number)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps([vars(result) for result in results], indent=1))
    print(_table(results), f"All runs: {options.output}", sep="\n\n")


def _stack(cell: Cell, ratio: str, port: int, folder: Path) -> Tandem:
    env = {}
    if ratio != "off":
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": ratio,
        }
    return Tandem(cell.engines, folder / f"{cell.engines.name}-{ratio}", ratio, env=env, console=False)


def _round(generator: Generator, cell: Cell, stacks: Sequence[Tandem], counter: Any, number: int) -> list[Result]:
    vocabulary = words(resolve_model(MODEL, weights=False) / "tokenizer.json")
    first = number % len(stacks)
    found = []
    for stack in [*stacks[first:], *stacks[:first]]:
        if not number:
            generator.run(stack.target, cell.lines(MODEL, vocabulary, -1)[:300], concurrency=16, seconds=2)
            time.sleep(SETTLE_S)
        before, spans = _used(stack), counter.value
        run = generator.run(stack.target, cell.lines(MODEL, vocabulary, number), seconds=cell.seconds)
        time.sleep(SETTLE_S)
        after = _used(stack)
        cpu = {group: 1e3 * (after[group] - before[group]) / max(1, run.requests) for group in after}
        result = Result(cell.name, stack.name, run.requests, cpu, counter.value - spans, run.ttft_ms.get("p50", 0.0))
        found.append(result)
        print(f"{number} {vars(result)}", file=sys.stderr, flush=True)
    return found


def _used(stack: Tandem) -> dict[str, float]:
    return {group: sum(map(cpu_s, pids)) for group, pids in stack.target.processes.items()}


def _table(results: Sequence[Result]) -> str:
    """Medians, and the difference to off within each round."""
    lines = [
        "CPU ms per request (median of the rounds; in brackets the median difference to off within a round)",
        "| load | tracing | frontend | router | workers | all three | spans per request |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in dict.fromkeys(result.cell for result in results):
        here = [result for result in results if result.cell == cell]
        off = [result for result in here if result.setting == "off"]
        for setting, label in SETTINGS.items():
            rows = [result for result in here if result.setting == setting]
            columns = [
                _cell([_sum(row, groups) for row in rows], [_sum(row, groups) for row in off])
                for groups in (("frontend",), ("router",), ("workers",), ("frontend", "router", "workers"))
            ]
            spans = statistics.median(row.spans / max(1, row.requests) for row in rows)
            lines.append(f"| {cell} | {label} | " + " | ".join(columns) + f" | {spans:.2f} |")
    return "\n".join(lines)


def _sum(result: Result, groups: Sequence[str]) -> float:
    return sum(result.cpu_ms.get(group, 0.0) for group in groups)


def _cell(values: Sequence[float], off: Sequence[float]) -> str:
    difference = statistics.median(a - b for a, b in zip(values, off, strict=True))
    return f"{statistics.median(values):.3f} ({difference:+.3f})"


if __name__ == "__main__":
    main()
