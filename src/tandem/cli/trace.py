"""`tandem trace ID`: where a request's time went, as a waterfall in the terminal, and why it was placed so."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from tandem.cli import console_client
from tandem.cli.console_client import ConsoleClient
from tandem.cli.status import table
from tandem.errors import ConfigError

_LEAST_BAR = 20
_RESET, _DIM, _BOLD, _RED = "\033[0m", "\033[2m", "\033[1m", "\033[31m"
#: Span name: (glyph of its bar, colour). The glyphs differ, so that nobody depends on the colours.
_BARS = {
    "prefill": ("▒", "\033[33m"),
    "kv_transfer": ("▚", "\033[32m"),
    "decode": ("█", "\033[34m"),
    "queue": ("┄", ""),
}
_OTHER_BAR = ("━", "\033[36m")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("id", nargs="?", help="request id or trace id, or the beginning of one; without it: the newest traces")
    add("--slow", action="store_true", help="of the newest: slow ones")
    add("--failed", action="store_true", help="of the newest: failed ones")
    add("--slowest", action="store_true", help="of the last minute: the slowest to their first token")
    add("--last", type=int, default=15, metavar="N", help="how many to list (default: 15)")
    add("--json", action="store_true", help="for programs")
    console_client.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    only = [name for name in ("slow", "failed", "slowest") if getattr(args, name)]
    if len(only) > 1:
        raise ConfigError("--slow, --failed and --slowest: one of them")
    if not 1 <= args.last <= 500:
        raise ConfigError(f"--last must be from 1 to 500, not {args.last}", param="last")
    console = ConsoleClient.of(args)
    if args.id is None:
        listed = console.traces("".join(only), args.last)
        print(json.dumps(listed, indent=1) if args.json else "\n".join(as_list(listed)))
        return 0
    trace = console.trace(args.id)
    if args.json:
        print(json.dumps(trace, indent=1))
    else:
        width = shutil.get_terminal_size((100, 24)).columns
        print("\n".join(as_text(trace, min(width, 160), colour=sys.stdout.isatty())))
    return 0


def as_list(traces: Iterable[dict[str, Any]]) -> list[str]:
    rows = [
        (
            t["request_id"], t["tenant"], t["class"], t["input_tokens"], t["cached_tokens"], t["output_tokens"],
            seconds(t["queue_s"]), seconds(t["ttft_s"]), seconds(t["duration_s"]) if t["ended"] else "running",
            t["decode_worker"] or "-", t["error"] or ("slow" if t["slow"] else ""),
        )
        for t in traces
    ]  # fmt: skip
    header = ("request", "tenant", "class", "prompt", "cached", "answer", "waited", "first", "whole", "decode on", "")
    return table(header, rows)


def as_text(trace: dict[str, Any], width: int, *, colour: bool = False) -> list[str]:
    """Facts, where the time went and the placement in words, the waterfall. Only names make a line too long."""
    lines = [_paint(trace["request_id"] or trace["trace_id"], _BOLD, colour), *_facts(trace), ""]
    lines += [line for words in trace["where_time_went"] for line in textwrap.wrap(words, width)]
    if trace["where_time_went"]:
        lines.append("")
    for placement in trace["placements"]:
        head = f"attempt {placement['attempt'] + 1}: " if len(trace["placements"]) > 1 else ""
        lines += [line for words in placement["words"] for line in textwrap.wrap(head + words, width)]
    if trace["placements"]:
        lines.append("")
    lines += _waterfall(trace["tree"], width, colour)
    if trace["error"]:
        lines += ["", _paint(f"It failed: {trace['error']}", _RED, colour)]
    return lines


def _facts(trace: dict[str, Any]) -> list[str]:
    marks = [word for word, said in (("slow", trace["slow"]), ("SLO missed", trace["slo_met"] is False)) if said]
    attempts = f", {trace['attempts']} attempts" if trace["attempts"] > 1 else ""
    return [
        f"trace {trace['trace_id']}, {trace['name']}, tenant {trace['tenant'] or '-'}, class {trace['class'] or '-'}"
        + attempts,
        f"first token {seconds(trace['ttft_s'])}, whole {seconds(trace['duration_s'])}, per token "
        f"{seconds(trace['tpot_s'])}; prompt {trace['input_tokens']:,} tokens ({trace['cached_tokens']:,} cached), "
        f"answer {trace['output_tokens']:,}" + (f"; {', '.join(marks)}" if marks else ""),
    ]


def _waterfall(tree: Sequence[dict[str, Any]], width: int, colour: bool) -> list[str]:
    if not tree:
        return ["no spans yet"]
    end = max(max(span["end_ms"] for span in tree), 1e-3)
    names = [f"{'  ' * span['depth']}{'! ' if span['error'] else ''}{span['name']}" for span in tree]
    where = [str(span["attributes"].get("tandem.worker", span["instance"]))[:24] for span in tree]
    took = [seconds((span["end_ms"] - span["begin_ms"]) / 1e3) for span in tree]
    columns = [max(len(text) for text in column) for column in (names, where, took)]
    bar = max(_LEAST_BAR, width - sum(columns) - 8)
    lines = []
    for span, name, place, time in zip(tree, names, where, took, strict=True):
        drawn = _bar(span, end, bar, colour)
        lines.append(
            f"{name:<{columns[0]}}  {_paint(f'{place:<{columns[1]}}', _DIM, colour)}  {time:>{columns[2]}} │{drawn}│"
        )
        for event in span["events"]:
            if event["name"] not in ("first_token", "placed"):
                reason = event["attributes"].get("tandem.reason") or event["attributes"].get("error.type") or ""
                lines.append(
                    f"{'':<{columns[0]}}  {event['name']} at {seconds(event['at_ms'] / 1e3)} {reason}".rstrip()
                )
        if (reason := span["attributes"].get("tandem.queue.reason", "none")) != "none":
            lines.append(f"{'':<{columns[0]}}  waited for: {str(reason).replace('_', ' ')}")
    scale = f"0{seconds(end / 1e3):>{bar - 1}}"
    lines.append(" " * (sum(columns) + 6) + _paint(scale, _DIM, colour))
    return lines


def _bar(span: dict[str, Any], end: float, width: int, colour: bool) -> str:
    glyph, paint = _BARS.get(span["name"], _OTHER_BAR)
    begin = min(width - 1, max(0, int(span["begin_ms"] / end * width)))
    length: int = max(1, min(width - begin, round((span["end_ms"] - span["begin_ms"]) / end * width)))
    return (
        " " * begin + _paint(glyph * length, _RED if span["error"] else paint, colour) + " " * (width - begin - length)
    )


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_RESET}" if colour and code else text


def seconds(value: float | None) -> str:
    """For people: 41 ms, 1.31 s, "-" if not known."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if value < 0.001:
        return f"{1e6 * value:.0f} µs"
    if value < 0.01:
        return f"{1e3 * value:.1f} ms"
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.2f} s"
