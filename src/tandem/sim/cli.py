"""`tandem sim`: replays a workload in virtual time and prints what a fleet would make of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from time import process_time

from tandem.errors import ConfigError
from tandem.sim import replay, tables, traces
from tandem.sim.fleet import DECODE_CHUNK, HARDWARE
from tandem.sim.metrics import SLOS
from tandem.sim.picture import to_svg
from tandem.sim.report import Figures, figures, to_html, to_json, to_text
from tandem.sim.simulation import Timing
from tandem.sim.study import POLICIES, Setup, simulate, slo_named, tw_goodput
from tandem.sim.synthetic import GENERATORS, generate
from tandem.sim.workload import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trace", metavar="FILE", help="Mooncake JSONL or Azure CSV, told apart by content")
    add("--workload", metavar="NAME", default="smooth-chat", help=f"made from the seed: {', '.join(GENERATORS)}")
    add("--block-size", type=int, default=512, help="tokens per hash id of a Mooncake trace (default: 512)")
    add("--requests", type=int, metavar="N", help="only so many requests, the first ones of a trace")
    add("--rate", type=float, action="append", metavar="R", help="mean requests/s; again for several rates")
    add("--concurrency", type=int, default=0, metavar="N", help="closed loop: N requests at any time, rates ignored")
    add("--hardware", default="h100-70b-tp4", help=f"of each worker: {', '.join(HARDWARE)}")
    add(
        "--fleet",
        action="append",
        metavar="SPLIT",
        help="3P5D, or 8D for aggregated; 2P2D@KIND+4D@KIND for mixed; again for several",
    )
    add("--policy", action="append", metavar="NAME", help=f"again for several: {', '.join(POLICIES)}")
    add("--slo", default="medium", help=f"{', '.join(SLOS)} (default: medium)")
    add("--chunk", type=int, default=DECODE_CHUNK, help="tokens per step of a worker that decodes")
    add("--kv-tokens", type=int, default=0, metavar="N", help="KV room of each worker instead of what memory leaves")
    add("--seed", type=int, default=0)
    add("--set", action="append", default=[], metavar="KNOB=VALUE", help="a knob of the decision core's policy")
    add("--report-age", type=float, default=0.0, metavar="S", help="load reports reach the router so late")
    add("--index-age", type=float, default=0.0, metavar="S", help="the prefix index is so old")
    add("--misfit", type=float, default=1.0, help="real steps take so many times what the profile says")
    add("--goodput", action="store_true", help="search the highest rate at which TW attainment holds")
    add("--json", metavar="FILE", help="write all figures ('-' = standard output)")
    add("--html", metavar="FILE", help="write a page with the space-time map (of the last run)")
    add("--svg", metavar="FILE", help="write the space-time map as a picture (of the last run)")
    add("--window", metavar="A:B", default="", help="seconds that the picture shows (default: all)")
    add(
        "--residuals",
        action="store_true",
        help="print how far the timing profiles are from published tables, and leave",
    )
    add(
        "--record",
        action="append",
        metavar="FILE",
        help="decide again what a live router recorded, compare, and leave; status 1 if a decision differs",
    )
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """ConfigError is the user's mistake. Figures go to standard output, progress to standard error."""
    if args.residuals:
        print(tables.to_text())
        return 0
    if args.record:
        return _decide_again([Path(name).expanduser() for name in args.record])
    base = _workload(args)
    found: list[Figures] = []
    for setup in _setups(args, base):
        if args.goodput:
            found.append(_goodput(setup, args))
            continue
        began = process_time()
        outcome = simulate(setup, None if args.quiet else progress(setup.policy))
        if not args.quiet:
            print(f"  {len(outcome.jobs)} requests simulated in {process_time() - began:.1f} s of CPU", file=sys.stderr)
        result = figures(setup, outcome)
        found.append(result)
        if args.json != "-":
            print(to_text(result), flush=True)
        if args.svg:
            begin, end = _window(args.window)
            title = f"{setup.policy} on {setup.split} of {setup.hardware} (simulated), {setup.workload.name}"
            Path(args.svg).write_text(to_svg(outcome, title, begin, end), encoding="utf-8")
        if args.html:
            Path(args.html).write_text(to_html(result, outcome, setup.slo), encoding="utf-8")
    if args.json == "-":
        sys.stdout.write(to_json(found))
    elif args.json:
        Path(args.json).write_text(to_json(found), encoding="utf-8")
    return 0


def _decide_again(paths: list[Path]) -> int:
    same = True
    for path in paths:
        comparison = replay.replay(path)
        print(replay.to_text(comparison), flush=True)
        same = same and not comparison.different
    return 0 if same else 1


def _workload(args: argparse.Namespace) -> Workload:
    if args.trace:
        workload = traces.load(Path(args.trace).expanduser(), args.seed, args.block_size)
        return workload.first(args.requests) if args.requests else workload
    return generate(args.workload, args.seed, args.requests)


def _setups(args: argparse.Namespace, base: Workload) -> Iterator[Setup]:
    knobs = dict(_knob(text) for text in args.set)
    if any(rate <= 0 for rate in args.rate or ()) or args.misfit <= 0:
        raise ConfigError("rates and the misfit must be positive", param="rate")
    for policy, split, rate in product(args.policy or ["tandem"], args.fleet or ["4P4D"], args.rate or [None]):
        yield Setup(
            workload=base if rate is None else base.at_rate(rate),
            hardware=args.hardware,
            split=split,
            policy=policy,
            slo=slo_named(args.slo),
            seed=args.seed,
            timing=Timing(report_age_s=args.report_age, index_age_s=args.index_age),
            misfit=args.misfit,
            chunk_tokens=args.chunk,
            kv_tokens=args.kv_tokens,
            concurrency=args.concurrency,
            knobs=knobs,
        )


def _window(text: str) -> tuple[float, float | None]:
    if not text:
        return 0.0, None
    try:
        begin, end = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise ConfigError(f"--window takes two times in seconds like 20:40, not {text!r}", param="window") from error
    if not 0.0 <= begin < end:
        raise ConfigError(f"--window must go forward from 0 or later, not {text!r}", param="window")
    return begin, end


def _knob(text: str) -> tuple[str, float | int | bool]:
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, int(value) if value.lstrip("-").isdecimal() else float(value)
    except ValueError as error:
        raise ConfigError(f"--set takes KNOB=NUMBER, not {text!r}", param="set") from error


def _goodput(setup: Setup, args: argparse.Namespace) -> Figures:
    def seen(rate: float, ok: bool) -> None:
        if not args.quiet:
            print(f"  {setup.policy} {setup.split} at {rate:.2f}/s: {'holds' if ok else 'fails'}", file=sys.stderr)

    rate = tw_goodput(setup, setup.workload.rate, seen)
    gpus = setup.fleet().gpus
    if args.json != "-":
        print(
            f"{setup.policy} on {setup.split} of {setup.hardware} (simulated), {setup.workload.name}, SLO "
            f"{setup.slo.name}: TW goodput {rate:.2f} requests/s, {rate / gpus:.3f} per GPU",
            flush=True,
        )
    return {
        "workload": setup.workload.name, "hardware": setup.hardware, "fleet": setup.split, "policy": setup.policy,
        "slo": setup.slo.name, "seed": setup.seed, "tw_goodput_per_s": rate, "gpus": gpus, "simulated": True,
    }  # fmt: skip


def progress(name: str) -> Callable[[int, int], None]:
    """A line on standard error that counts up, where somebody watches."""
    live = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        every = max(1, total // 50)
        if live and (done % every == 0 or done == total):
            end = "\r" if done < total else "\r\x1b[K"
            print(f"  {name}: {done} of {total} requests", end=end, file=sys.stderr, flush=True)

    return show
