"""`tandem top`: the cluster now, again and again; once where nobody watches a terminal."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from tandem.cli import console_client
from tandem.cli.console_client import ConsoleClient
from tandem.cli.status import table
from tandem.cli.trace import seconds
from tandem.errors import ConfigError, Lost

#: Cursor home, and clear to the end: no flicker, and what was scrolled away stays.
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\033[H", "\033[K", "\033[J"
_ALTERNATE, _NORMAL, _HIDE, _SHOW = "\033[?1049h", "\033[?1049l", "\033[?25l", "\033[?25h"
_METER = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="print it once and leave")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between looks (default: 1)")
    console_client.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not 0.2 <= args.interval <= 3600:
        raise ConfigError(f"--interval must be from 0.2 to 3600 seconds, not {args.interval:g}", param="interval")
    console = ConsoleClient.of(args)
    if args.once or not sys.stdout.isatty():
        print("\n".join(as_text(console.cluster())))
        return 0
    try:
        sys.stdout.write(_ALTERNATE + _HIDE)
        while True:
            _draw(console)
            time.sleep(args.interval)
    except KeyboardInterrupt:
        return 0
    finally:
        sys.stdout.write(_SHOW + _NORMAL)
        sys.stdout.flush()


def _draw(console: ConsoleClient) -> None:
    size = shutil.get_terminal_size((100, 24))
    try:
        lines = as_text(console.cluster())
    except Lost as lost:  # it may come back
        lines = [lost.message]
    shown = [line[: size.columns] + _CLEAR_LINE for line in lines[: size.lines - 1]]
    sys.stdout.write(_HOME + "\r\n".join(shown) + _CLEAR_LINE + "\r\n" + _CLEAR_BELOW)
    sys.stdout.flush()


def as_text(cluster: dict[str, Any]) -> list[str]:
    """What /api/cluster says."""
    recent = cluster["recent"]
    waiting = sum(model["queue"]["requests"] for model in cluster["models"])
    lines = [
        f"cluster {cluster['cluster']}: {cluster['in_flight']} in flight on workers, {waiting} waiting"
        + ("" if cluster["bus"] else "   THE BUS IS AWAY"),
        f"last minute: {_rate(recent.get('requests_per_s'))} requests/s, {_rate(recent.get('output_tokens_per_s'))} "
        f"tokens/s; TTFT p50 {seconds(recent.get('ttft_p50_s'))}, p99 {seconds(recent.get('ttft_p99_s'))}",
        f"             between tokens p50 {seconds(recent.get('itl_p50_s'))}, p99 {seconds(recent.get('itl_p99_s'))}; "
        f"goodput {_rate(recent.get('goodput_per_s'))}/s, prefix hits {_percent(recent.get('hit_rate'))}",
    ]
    for model in cluster["models"]:
        lines += ["", *_model(model)]
    return lines


def _model(model: dict[str, Any]) -> list[str]:
    queue = model["queue"]
    waits = ", ".join(f"{d['name']} {d['requests']}" for d in queue["by_class"] if d["requests"])
    tenants = ", ".join(f"{d['name']} {d['requests']}" for d in queue["by_tenant"] if d["requests"])
    age = f", as of {model['age_s']:.0f} s ago" if (model["age_s"] or 0) > 5 else ""
    lines = [
        f"{model['model']}: leader {model['leader'] or 'none'}, {model['in_flight']} placed, "
        f"{queue['requests']} waiting ({queue['tokens']:,} tokens, oldest {seconds(queue['oldest_wait_s'])}){age}"
    ]
    if waits or tenants:
        lines.append(f"  waiting by class: {waits or 'none'}; by tenant: {tenants or 'none'}")
    header = ("worker", "role", "state", "run", "wait", "prefill", "KV", "", "booked", "prefill booked", "handoffs")
    return lines + table(header, [_worker(worker) for worker in _ordered(model["workers"])])


def _ordered(workers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(workers, key=lambda w: (w["role"] != "prefill", len(w["id"]), w["id"]))


def _worker(worker: dict[str, Any]) -> tuple[object, ...]:
    total = worker["kv_blocks_total"]
    share = worker["kv_blocks_used"] / total if total else 0.0
    filled = round(share * _METER)
    return (
        worker["id"], worker["role"], worker["state"], worker["running"], worker["waiting"],
        worker["pending_prefill_tokens"], "█" * filled + "░" * (_METER - filled), f"{share:4.0%}",
        worker["booked_requests"], seconds(worker["booked_prefill_s"]), worker["handoffs"],
    )  # fmt: skip


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
