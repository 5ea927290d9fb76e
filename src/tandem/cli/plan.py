"""`tandem plan`: which fleet, of the GPUs that there are, serves a workload within its SLO at the least cost."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from math import log
from pathlib import Path

from tandem.adapters import deployment as deployment_file
from tandem.adapters.clock import monotonic
from tandem.adapters.deployment import Class, Deployment, Model, Pool, PoolRole
from tandem.errors import ConfigError
from tandem.sim import plan_report, planning, traces
from tandem.sim.fleet import DECODE_CHUNK, PREFILL_CHUNK
from tandem.sim.metrics import SLOS, Slo
from tandem.sim.plan_report import Plan
from tandem.sim.planning import PRICES, Candidate, Found, Group, Level, Task
from tandem.sim.study import slo_named
from tandem.sim.synthetic import GENERATORS, generate
from tandem.sim.workload import Offered, Workload
from tandem.wire import profile_file

#: So that nobody waits for long.
_REQUESTS = 2000
#: What a model is served from where the user names no folder.
_FOLDERS = {
    "8b": "Llama-3.1-8B-Instruct",
    "70b": "Llama-3.1-70B-Instruct",
    "70b-fp8": "Llama-3.1-70B-Instruct-FP8",
    "gpt-oss-120b": "gpt-oss-120b",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    known = "; ".join(f"{model} on {', '.join(gpus)}" for model, gpus in planning.models().items())
    prices = ", ".join(f"{gpu} {price:g}" for gpu, price in PRICES.items())
    add("--model", default="70b", help=f"with timing profiles there are: {known} (default: 70b)")
    add(
        "--gpus",
        action="append",
        metavar="TYPE=N",
        help="GPUs that there are, like h100=16; again for other types; TYPE may be a file of `tandem profile`",
    )
    add("--price", action="append", default=[], metavar="TYPE=USD", help=f"per GPU and hour (defaults: {prices})")
    add("--trace", metavar="FILE", help="Mooncake JSONL or Azure CSV, told apart by content")
    add("--workload", metavar="NAME", help=f"made from the seed: {', '.join(GENERATORS)}")
    add("--isl", type=int, metavar="N", help="without trace or workload: mean prompt tokens (default: 2000)")
    add("--osl", type=int, metavar="N", help="and mean output tokens (default: 250)")
    add("--spread", type=float, default=0.5, metavar="S", help="of these lengths, lognormal; 0 = all alike")
    add("--block-size", type=int, default=512, help="tokens per hash id of a Mooncake trace (default: 512)")
    add("--rate", type=float, metavar="R", help="requests/s to serve (default: the trace's own)")
    add("--requests", type=int, default=_REQUESTS, metavar="N", help=f"that a run has at most (default: {_REQUESTS})")
    add("--slo", default="medium", help=f"{', '.join(SLOS)} (default: medium)")
    add("--ttft", type=float, metavar="S", help="instead: seconds to the first token ...")
    add("--ttft-per-token", type=float, metavar="S", help="... and for each prompt token more")
    add("--tpot", type=float, metavar="S", help="instead: mean seconds per output token")
    add("--headroom", type=float, default=0.2, metavar="SHARE", help="to serve beyond the rate (default: 0.2)")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=2, metavar="N", help="processes (default: 2); the outcome is the same")
    add("--model-path", metavar="FOLDER", help="what the deployment file serves the model from")
    add("--deployment", metavar="FILE", help="write the deployment file here instead of printing it")
    add("--html", metavar="FILE", help="write a page with the chart")
    add("--json", metavar="FILE", help="write the figures")
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Status 1 if no fleet meets the SLO at that rate."""
    _check(args)
    offered = [(planning.sizes(args.model, gpu), count) for gpu, count in _pairs(args.gpus or ["h100=16"], "gpus")]
    prices = _prices(args.price, [kinds[0].gpu for kinds, _ in offered])
    workload = _workload(args)
    task = Task(workload, _slo(args), args.seed)
    need = workload.rate * (1.0 + args.headroom)
    print(_intro(args, task, prices), flush=True)
    found = _searched(planning.levels(offered), task, args)
    if finer := planning.between(offered, found, prices, need):
        found += _searched(finer, task, args)
    plan = Plan(found, prices, workload.rate, need)
    text = [plan_report.to_text(plan), ""]
    chosen = plan.cheapest[0] if plan.cheapest else None
    shown = chosen or max(found, key=lambda each: each.rate)
    if shown.rate > 0:
        text.append(f"what breaks first as load grows, on {shown.best}:")
        text += plan_report.what_breaks(shown.best, planning.fitted(task, shown.level), shown.rate)
    print("\n".join(text))
    yaml = _deployment(chosen.best, task, args).to_yaml() if chosen else ""
    if chosen:
        _write_deployment(yaml, args)
    title = f"{args.model} at {workload.rate:.2f} requests/s within the {task.slo.name} SLO"
    _write(args.html, plan_report.to_html(plan, title, "\n".join(text), yaml), "html")
    _write(args.json, _as_json(plan, args, task), "json")
    return 0 if chosen else 1


# -- what is asked -----------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    if args.trace and args.workload:
        raise ConfigError("--trace and --workload exclude each other", param="trace")
    if (args.trace or args.workload) and (args.isl or args.osl):
        raise ConfigError("--isl and --osl go with --rate alone: a trace or workload has its own lengths", param="isl")
    positive = {name: getattr(args, name) for name in ("rate", "isl", "osl", "requests", "ttft", "tpot", "jobs")}
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} must be positive", param=name)
    if args.headroom < 0 or args.spread < 0 or args.block_size < 1:
        raise ConfigError("--headroom, --spread and --block-size cannot be negative", param="headroom")


def _pairs(given: Iterable[str], option: str) -> list[tuple[str, int]]:
    found = []
    for text in given:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or not int(number):
            raise ConfigError(f"--{option} takes TYPE=N with a whole number, not {text!r}", param=option)
        found.append((name if profile_file.is_file(name) else name.lower(), int(number)))
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"--{option} names a type twice", param=option)
    return found


def _prices(given: Iterable[str], gpus: Sequence[str]) -> Mapping[str, float]:
    prices = {gpu: PRICES.get(gpu, 1.0) for gpu in gpus}
    for text in given:
        name, _, number = text.rpartition("=")
        name = Path(name).stem if profile_file.is_file(name) else name.lower()
        try:
            price = float(number)
        except ValueError:
            price = -1.0
        if name not in prices or price < 0:
            raise ConfigError(f"--price takes TYPE=USD, of types that --gpus names, not {text!r}", param="price")
        prices[name] = price
    return prices


def _slo(args: argparse.Namespace) -> Slo:
    base = slo_named(args.slo)
    if args.ttft is None and args.tpot is None and args.ttft_per_token is None:
        return base
    if args.ttft is None and args.ttft_per_token is not None:
        raise ConfigError("--ttft-per-token goes with --ttft", param="ttft-per-token")
    if args.ttft is None:
        return Slo("given", base.ttft_s, base.ttft_per_token_s, args.tpot)
    return Slo("given", args.ttft, args.ttft_per_token or 0.0, args.tpot or base.tpot_s)


def _workload(args: argparse.Namespace) -> Workload:
    if args.trace:
        workload = traces.load(Path(args.trace).expanduser(), args.seed, args.block_size).first(args.requests)
    elif args.workload:
        workload = generate(args.workload, args.seed, args.requests)
    else:
        workload = _drawn(args)
    return workload.at_rate(args.rate) if args.rate else workload


def _drawn(args: argparse.Namespace) -> Workload:
    """Poisson arrivals; lognormal lengths of the given means."""
    if not args.rate:
        raise ConfigError("say what to serve: --trace FILE, --workload NAME, or --rate R with --isl and --osl")
    rng, clock, requests = random.Random(args.seed), 0.0, []
    isl, osl, sigma = args.isl or 2000, args.osl or 250, args.spread
    for _ in range(args.requests):
        clock += rng.expovariate(args.rate)
        drawn = [max(1, round(rng.lognormvariate(log(mean) - sigma * sigma / 2, sigma))) for mean in (isl, osl)]
        requests.append(Offered(clock, drawn[0], drawn[1]))
    return Workload(f"{isl} in, {osl} out", 64, tuple(requests))


def _intro(args: argparse.Namespace, task: Task, prices: Mapping[str, float]) -> str:
    requests, slo = task.workload.requests, task.slo
    isl = sum(r.isl_tokens for r in requests) / len(requests)
    osl = sum(r.osl_tokens for r in requests) / len(requests)
    asked = ", ".join(f"{gpu} ${price:g}/h" for gpu, price in prices.items())
    return (
        f"{args.model}, {task.workload.name}: {len(requests)} requests at {task.workload.rate:.2f}/s, "
        f"mean prompt {isl:.0f} and output {osl:.0f} tokens\n"
        f"SLO {slo.name}: TTFT {slo.ttft_s:g} s + {1e3 * slo.ttft_per_token_s:g} ms a prompt token, TPOT "
        f"{1e3 * slo.tpot_s:g} ms; prices: {asked}; all figures are simulated"
    )


# -- the search --------------------------------------------------------------------------------------------------------


def _searched(levels: Sequence[Level], task: Task, args: argparse.Namespace) -> list[Found]:
    """In the order of ``levels``, whoever is done first."""
    began = monotonic()
    show: Callable[[int, int], None] = (lambda done, runs: None) if args.quiet else _bar(levels, began)
    found: dict[int, Found] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        # The largest take longest: they begin first.
        order = sorted(range(len(levels)), key=lambda i: -levels[i].total)
        waiting = {pool.submit(planning.search, levels[i], task): i for i in order}
        try:
            show(0, 0)
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                show(sum(levels[i].total for i in found), sum(each.runs for each in found.values()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    runs = sum(each.runs for each in found.values())
    print(f"{len(levels)} levels, {runs} simulations, {monotonic() - began:.0f} s\n", flush=True)
    return [found[i] for i in range(len(levels))]


def _bar(levels: Sequence[Level], began: float) -> Callable[[int, int], None]:
    total, live = sum(level.total for level in levels), sys.stderr.isatty()

    def show(done: int, runs: int) -> None:
        filled = 30 * done // total
        left = (monotonic() - began) / done * (total - done) if done else 0.0
        text = f"[{'#' * filled}{'.' * (30 - filled)}] {done / total:4.0%}, {runs} simulations, {left:.0f} s left"
        if live:
            print(f"\r\x1b[K{text if done < total else ''}", end="", file=sys.stderr, flush=True)
        elif done:
            print(text, file=sys.stderr, flush=True)

    return show


# -- the outcome -------------------------------------------------------------------------------------------------------


def _deployment(candidate: Candidate, task: Task, args: argparse.Namespace) -> Deployment:
    """Checked by the same rules as any deployment file."""
    longest = max(request.isl_tokens + request.osl_tokens for request in task.workload.requests)
    slo = task.slo
    model = Model(
        name=_FOLDERS.get(args.model, args.model),
        path=args.model_path or f"/models/{_FOLDERS.get(args.model, args.model)}",
        max_model_len=max(4096, 1 << longest.bit_length()),
        pools=tuple(pool for group in candidate.groups for pool in _pools(group, candidate)),
    )
    standard = Class(
        name="interactive",
        ttft_slo_s=slo.ttft_s,
        ttft_slo_per_token_s=slo.ttft_per_token_s,
        tpot_slo_s=slo.tpot_s,
    )
    wanted = Deployment(models=(model,), classes=(standard,))
    return deployment_file.parse(wanted.to_yaml(), source="plan")


def _pools(group: Group, candidate: Candidate) -> Iterable[Pool]:
    size = group.size
    several = len(candidate.groups) > 1
    measured = profile_file.is_file(size.kind)
    for role, count, chunk in (
        (PoolRole.PREFILL, group.prefill, PREFILL_CHUNK),
        (PoolRole.DECODE if candidate.disaggregated else PoolRole.AGGREGATED, group.decode, DECODE_CHUNK),
    ):
        if not count:
            continue
        args: dict[str, object] = {"max_num_batched_tokens": size.hardware.chunk_tokens or chunk}
        if size.gpus > 1:
            args["tensor_parallel_size"] = size.gpus
        yield Pool(
            role=role,
            name=f"{role.value}-{size.gpu}-{size.gpus}" if several else "",
            replicas=count,
            engine_args=args,
            profile=size.kind if measured else size.hardware.profile.name,
        )


def _write_deployment(yaml: str, args: argparse.Namespace) -> None:
    head = f"# From `tandem plan --model {args.model}`; one machine's `tandem up -f` needs all of its GPUs at hand.\n"
    if args.deployment:
        _write(args.deployment, head + yaml, "deployment")
        print(f"\ndeployment file written to {args.deployment}: tandem up -f {args.deployment}")
    else:
        print(f"\ndeployment file:\n{head}{yaml}", end="")


def _as_json(plan: Plan, args: argparse.Namespace, task: Task) -> str:
    cheapest = plan.cheapest
    rows = [
        {
            "gpus": dict(found.level.gpus),
            "usd_per_hour": plan.cost(found),
            "aggregated": {
                "fleet": found.aggregated.split if found.aggregated else None,
                "rate": found.aggregated_rate,
            },
            "split": {"fleet": found.split.split if found.split else None, "rate": found.split_rate},
            "frontier": found in plan.frontier,
            "meets": found.rate >= plan.need,
        }
        for found in plan.found
    ]
    best = plan.best_per_gpu
    content = {
        "model": args.model,
        "workload": task.workload.name,
        "seed": args.seed,
        "offered_per_s": plan.offered,
        "needed_per_s": plan.need,
        "levels": rows,
        "cheapest": cheapest[0].best.split if cheapest else None,
        "best_per_gpu": best.best.split if best else None,
        "simulated": True,
    }
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _write(name: str | None, text: str, option: str) -> None:
    if not name:
        return
    try:
        Path(name).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {name}: {error.strerror or error}", param=option) from None
