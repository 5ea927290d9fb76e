"""What serving costs beside the engine: Tandem, and a peer where its kit is given, in alternating rounds.

    python -m bench.serve [--kit FOLDER] [--rounds 5] [--quick] [--only TEXT ...] [--output FILE]

Real NATS and Redis, engines that compute nothing, clients on the same machine. Writes all runs as JSON and prints the
medians, and the goals as ratios within each round. CPU per request is the figure to trust on a machine that others
use too; ``others`` says how many cores they took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.serve import cells, engine_alone, report
from bench.serve.cells import Cell
from bench.serve.load import Generator, cpu_s, memory_mb, temporary_folder, words
from bench.serve.report import Record
from bench.serve.stacks import MODEL, Dynamo, Engines, Stack, Tandem, install
from tandem.models.prepare import resolve_model


def main() -> None:
    options = _options()
    chosen = cells.QUICK if options.quick else cells.ALL
    chosen = [cell for cell in chosen if not options.only or any(text in cell.name for text in options.only)]
    if not chosen:
        sys.exit("no cell has such a name; there are: " + ", ".join(cell.name for cell in cells.ALL))
    if options.kit:
        install(options.kit, options.state)
    vocabulary = words(resolve_model(MODEL, weights=False) / "tokenizer.json")
    records: list[Record] = []
    with temporary_folder() as name:
        generator = Generator(Path(name))
        for engines in dict.fromkeys(cell.engines for cell in chosen):
            here = [cell for cell in chosen if cell.engines == engines]
            with _stacks(engines, options, Path(name), any(cell.hf_too for cell in here)) as stacks:
                at_rest = {stack.name: _memory_mb(stack) for stack in stacks}
                print(f"{engines.name}: memory at rest, MB: {at_rest}", file=sys.stderr)
                for number in range(options.rounds):
                    for cell in here:
                        records += _round(generator, cell, stacks, vocabulary, number)
                idle = {stack.name: _idle_ms_per_s(stack) for stack in stacks}
            print(f"{engines.name}: CPU of idle stacks, ms/s: {idle}", file=sys.stderr)
    options.output.write_text(json.dumps({"machine": _machine(), "runs": [r.as_json() for r in records]}, indent=1))
    print(report.table(records), report.goals(records), f"All runs: {options.output}", sep="\n\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kit", type=Path, help="folder of scripts that install and start the peer; without it: Tandem alone")
    add("--state", type=Path, default=Path(os.environ.get("PEERS", "/tmp/tandem-peers")), help="where the kit installs")
    add("--rounds", type=int, default=0, help="of every cell (default: 5; with --quick 1)")
    add("--quick", action="store_true", help="a few cells only")
    add("--only", nargs="*", default=[], metavar="TEXT", help="cells whose name has it")
    add("--processes", type=int, default=1, help="of Tandem's frontend")
    add("--output", type=Path, default=Path("build/bench-serve.json"))
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return options


@contextlib.contextmanager
def _stacks(engines: Engines, options: argparse.Namespace, folder: Path, hf: bool) -> Iterator[list[Stack]]:
    """All of them up at once: alternating needs no restarts, and what idles costs next to nothing (it is printed)."""
    with contextlib.ExitStack() as running:
        stacks: list[Stack] = [Tandem(engines, folder / f"tandem-{engines.name}", processes=options.processes)]
        if hf:
            stacks.append(Tandem(engines, folder / f"hf-{engines.name}", "tandem-hf", tokenizer="hf"))
        if options.kit:
            stacks.append(Dynamo(engines, options.kit, options.state))
        yield [running.enter_context(stack) for stack in stacks]


def _round(
    generator: Generator, cell: Cell, stacks: Sequence[Stack], vocabulary: Sequence[str], number: int
) -> Iterator[Record]:
    """Every stack once; who goes first changes from round to round."""
    first = number % len(stacks)
    for stack in [*stacks[first:], *stacks[:first]]:
        if stack.name == "tandem-hf" and not cell.hf_too:
            continue
        lines = cell.lines(stack.target.model, vocabulary, number)
        if not number:  # caches of code, connections and branch predictors, not of prompts
            warm_up = cell.lines(stack.target.model, vocabulary, -1)[:200]
            if not cell.workload:
                generator.run(stack.target, warm_up, concurrency=16, seconds=1)
        alone = {}
        if cell.concurrency == 1 and stack.name == "tandem" and cell.engines == cells.ZERO:
            alone = engine_alone.measured(isl=cell.isl, osl=cell.osl)
        run = generator.run(
            stack.target,
            lines,
            concurrency=cell.concurrency,
            seconds=cell.seconds,
            quick_ack=cell.quick_ack,
        )
        run = replace(run, engine_ttft_ms=alone)
        cpu = report.routing_cpu(run)
        ttft = run.ttft_ms.get("p50", 0.0)
        print(
            f"{number} {cell.name:28} {stack.name:10} {run.requests_per_s:7.0f} req/s  frontend+router {cpu:6.3f} ms  "
            f"TTFT p50 {ttft:7.2f} ms  others {run.others_cores:.2f} cores  failed {run.failed}",
            file=sys.stderr,
            flush=True,
        )
        yield Record(number, stack.name, cell.name, run)


def _idle_ms_per_s(stack: Stack, seconds: float = 2.0) -> float:
    def used() -> float:
        return sum(cpu_s(pid) for pids in stack.target.processes.values() for pid in pids)

    before = used()
    time.sleep(seconds)
    return round(1e3 * (used() - before) / seconds, 1)


def _memory_mb(stack: Stack) -> dict[str, int]:
    return {group: round(sum(map(memory_mb, pids))) for group, pids in stack.target.processes.items()}


def _machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "load_average": os.getloadavg(),
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


if __name__ == "__main__":
    main()
