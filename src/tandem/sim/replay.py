"""Decides again what a live router recorded, with the same core, and holds the decisions against the recorded ones.

A decision is: a request placed (where, with what belief about caches, at what priority), refused (why) or recalled; a
submit refused at once; the requests that ended with a worker or by an abort.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from tandem.core.scheduler import Scheduler
from tandem.errors import TandemError
from tandem.wire import record

#: Differences that are described.
_SHOWN = 10


@dataclass(slots=True)
class Comparison:
    """What a recording holds, and how far the core decides the same."""

    path: Path
    begin: record.Begin
    lines: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)  # recorded ones, by kind
    equal: int = 0
    different: int = 0
    shown: list[str] = field(default_factory=list)
    last_at: float = 0.0

    def count(self, line: int, recorded: Sequence[object], found: Sequence[object]) -> None:
        for was, now in zip_longest(recorded, found):
            if was == now:
                self.equal += 1
                continue
            self.different += 1
            if len(self.shown) < _SHOWN:
                self.shown.append(f"line {line}: recorded {was}, decided again: {now}")


def replay(path: Path) -> Comparison:
    """ConfigError if it is no recording."""
    lines = record.read(path)
    begin = next(lines, None)
    if not isinstance(begin, record.Begin):
        raise record.empty(path)
    scheduler = Scheduler(
        begin.policy,
        classes=begin.classes,
        tenants=begin.tenants,
        rng=random.Random(begin.seed),
        profiles=begin.profiles,
    )
    comparison = Comparison(path, begin, last_at=begin.at)
    for number, line in enumerate(lines, 2):
        comparison.lines[type(line).__name__] += 1
        comparison.last_at = max(comparison.last_at, line.at)
        _again(scheduler, line, number, comparison)
    return comparison


def _again(scheduler: Scheduler, line: record.Line, number: int, comparison: Comparison) -> None:
    at = line.at
    match line:
        case record.Polled():
            found = tuple(record.decision(effect) for effect in scheduler.poll(at))
            comparison.decisions.update(decision.kind for decision in line.decisions)
            comparison.count(number, line.decisions, found)
        case record.Submitted():
            refused = ""
            try:
                scheduler.submit(line.request, line.cached, at)
            except TandemError as error:
                refused = error.code
            if line.refused:
                comparison.decisions["refuse at once"] += 1
            if line.refused or refused:
                comparison.count(number, (line.refused,), (refused,))
        case record.WorkerUp():
            comparison.decisions["end with a worker"] += len(line.lost)
            comparison.count(number, line.lost, tuple(scheduler.worker_up(line.spec, at)))
        case record.WorkerReport():
            scheduler.worker_load(line.load, at)
        case record.WorkerSuspect():
            scheduler.worker_suspect(line.worker, line.suspect, at)
        case record.WorkerDown():
            comparison.decisions["end with a worker"] += len(line.lost)
            comparison.count(number, line.lost, tuple(scheduler.worker_down(line.worker, line.incarnation, at)))
        case record.PrefillDone():
            scheduler.prefill_done(line.key, at)
        case record.DecodeStarted():
            scheduler.decode_started(line.key, at)
        case record.Finished():
            scheduler.finished(line.key, line.output_tokens, line.cached_tokens, at)
        case record.Failed():
            scheduler.failed(line.key, at)
        case record.Aborted():
            ended = scheduler.abort(line.request_id, line.max_attempt, at, choice=line.choice)
            comparison.decisions["end by an abort"] += len(line.ended)
            comparison.count(number, line.ended, tuple(ended))
        case record.Reconfigured():
            scheduler.reconfigure(line.policy, classes=line.classes, tenants=line.tenants, now=at)
        case record.Restored():
            scheduler.restore_counters(line.counters)


def to_text(comparison: Comparison) -> str:
    begin, lines, decisions = comparison.begin, comparison.lines, comparison.decisions
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(decisions.items()) if count) or "none"
    verdict = "the core decides the same" if not comparison.different else "THE CORE DECIDES OTHERWISE"
    return "\n".join(
        [
            f"{comparison.path}: model {begin.model}, router {begin.router}, {comparison.last_at - begin.at:.1f} s",
            f"  {lines['Submitted']} submits, {lines['WorkerReport']} load reports, {lines['Polled']} looks at the "
            f"queue, {sum(lines.values())} calls in all; decisions: {kinds}",
            f"  decisions equal {comparison.equal}, different {comparison.different}: {verdict}",
            *(f"  {shown}" for shown in comparison.shown),
        ]
    )
