"""A run's figures as one plain dictionary (what ``--json`` writes), as text, and as a self-contained page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from tandem.sim.metrics import GapHistogram, Job, Slo, Span, attainment, spread
from tandem.sim.simulation import Outcome
from tandem.sim.study import Setup
from tandem.spacetime import model as spacetime
from tandem.spacetime.model import KINDS, TRANSFER

Figures = dict[str, Any]

_PAGE = "spacetime.html"
_MARK = "/*DATA*/null"
#: What the page holds of the module that the console draws with, too.
_ASSETS = {"/*MAP.CSS*/": "map.css", "/*MAP.JS*/": "map.js"}
#: Spans of the map that are drawn apart, per worker.
_RESOLUTION = 3000
_DOTS = 3000


def figures(setup: Setup, outcome: Outcome) -> Figures:
    """Seconds, tokens, requests. GPU times are simulated from the named profiles."""
    jobs, slo = outcome.jobs, setup.slo
    served = [job for job in jobs if job.finished_s is not None]
    duration = max(outcome.end_s, 1e-9)
    good = sum(job.attained(slo) for job in jobs)
    gpus = outcome.fleet.gpus
    return {
        "setup": describe(setup, outcome),
        "requests": {
            "offered": len(jobs),
            "served": len(served),
            "refused": dict(sorted(Counter(job.refused for job in jobs if job.refused).items())),
            "preempted": sum(job.preemptions for job in jobs),
            "computed_remotely": sum(job.handoff_s is not None for job in jobs),
        },
        "duration_s": outcome.end_s,
        "throughput": {
            "requests_per_s": len(served) / duration,
            "input_tokens_per_s": sum(job.offered.isl_tokens for job in served) / duration,
            "output_tokens_per_s": sum(job.offered.osl_tokens for job in served) / duration,
        },
        "goodput": {"requests_per_s": good / duration, "requests_per_s_per_gpu": good / duration / gpus},
        "attainment": _attainment(jobs, slo),
        "by_tenant_and_class": {
            name: _attainment(group, slo) | {"ttft_s": spread(_known(job.ttft_s for job in group))}
            for name, group in _groups(jobs).items()
        },
        "ttft_s": spread(_known(job.ttft_s for job in jobs)),
        "tpot_s": spread(_known(job.tpot_s for job in jobs)),
        "itl_s": _itl(outcome),
        "queue_s": spread(job.placed_s - job.offered.arrival_s for job in jobs if job.placed_s is not None),
        "hit_rate": _ratio(sum(job.cached_tokens for job in served), sum(job.offered.isl_tokens for job in served)),
        "transfers": {
            "count": len(outcome.transfers),
            "bytes": sum(transfer.num_bytes for transfer in outcome.transfers),
            "seconds": spread(transfer.end_s - transfer.begin_s for transfer in outcome.transfers),
        },
        "workers": [_worker(outcome, i) for i in range(len(outcome.workers))],
    }


def describe(setup: Setup, outcome: Outcome) -> Figures:
    kinds = dict.fromkeys(worker.hardware for worker in outcome.fleet.workers)
    return {
        "workload": setup.workload.name,
        "rate_per_s": len(outcome.jobs) / max(outcome.end_s, 1e-9) if setup.concurrency else setup.workload.rate,
        "concurrency": setup.concurrency,
        "hardware": setup.hardware,
        "fleet": setup.split,
        "gpus": outcome.fleet.gpus,
        "policy": setup.policy,
        "knobs": dict(setup.knobs),
        "slo": {
            "name": setup.slo.name,
            "ttft_s": setup.slo.ttft_s,
            "ttft_per_token_s": setup.slo.ttft_per_token_s,
            "tpot_s": setup.slo.tpot_s,
        },
        "seed": setup.seed,
        "report_age_s": setup.timing.report_age_s,
        "index_age_s": setup.timing.index_age_s,
        "misfit": setup.misfit,
        "chunk_tokens": setup.chunk_tokens,
        "profiles": [
            {
                "name": kind.profile.name,
                "source": kind.profile.source,
                "relative_error": kind.profile.relative_error,
                "kv_tokens": kind.kv_tokens,
            }
            for kind in kinds
        ],
        "simulated": True,
    }


def _attainment(jobs: Sequence[Job], slo: Slo) -> Figures:
    found = attainment(jobs, slo)
    return {
        "requests": found.requests, "tokens": found.tokens, "length_quartiles": list(found.quartiles), "tw": found.tw,
    }  # fmt: skip


def _groups(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(f"{job.offered.tenant}/{job.offered.request_class or 'default'}", []).append(job)
    return dict(sorted(groups.items()))


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _itl(outcome: Outcome) -> dict[str, float]:
    gaps = GapHistogram()
    for worker in outcome.workers:
        gaps.merge(worker.activity.gaps)
    return dict(zip(("p50", "p90", "p95", "p99"), gaps.percentiles((0.5, 0.9, 0.95, 0.99)), strict=True))


def _worker(outcome: Outcome, index: int) -> Figures:
    worker = outcome.workers[index]
    activity = worker.activity
    return {
        "id": worker.id,
        "role": worker.setup.role.value,
        "utilisation": activity.busy_s / max(outcome.end_s, 1e-9),
        "prefill_share": _ratio(activity.prefill_s, activity.busy_s),
        "prefill_tokens": activity.prefill_tokens,
        "decode_tokens": activity.decode_tokens,
        "preemptions": worker.model.preemptions,
    }


def to_json(found: object) -> str:
    """The same figures give the same bytes."""
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def to_text(found: Mapping[str, Any]) -> str:
    """What a person reads first."""
    setup, requests, met = found["setup"], found["requests"], found["attainment"]
    ttft, tpot, itl, queue = (found[name] for name in ("ttft_s", "tpot_s", "itl_s", "queue_s"))
    used = [worker["utilisation"] for worker in found["workers"]]
    refused = ", ".join(f"{count} {code}" for code, count in requests["refused"].items()) or "none"
    low, high = min(used), max(used)
    quartiles = " ".join(f"{share:.2f}" for share in met["length_quartiles"])
    rows = [
        f"{setup['policy']} on {setup['fleet']} of {setup['hardware']} (simulated), "
        f"{setup['workload']} at {setup['rate_per_s']:.2f} requests/s, SLO {setup['slo']['name']}",
        f"  offered {requests['offered']}, served {requests['served']}, refused: {refused}; "
        f"{requests['computed_remotely']} prompts computed remotely",
        f"  attained {met['requests']:.3f} of requests, {met['tokens']:.3f} of tokens, by length {quartiles}"
        f"  ->  TW {'holds' if met['tw'] else 'fails'}",
        f"  goodput {found['goodput']['requests_per_s']:.2f} requests/s, "
        f"{found['throughput']['output_tokens_per_s']:.0f} output tokens/s",
        f"  TTFT   p50 {1e3 * ttft['p50']:.0f} ms, p90 {1e3 * ttft['p90']:.0f}, p99 {1e3 * ttft['p99']:.0f}"
        f"   queue p50 {1e3 * queue['p50']:.0f} ms, p99 {1e3 * queue['p99']:.0f}",
        f"  TPOT   p50 {1e3 * tpot['p50']:.1f} ms, p90 {1e3 * tpot['p90']:.1f}, p99 {1e3 * tpot['p99']:.1f}"
        f"   ITL p50 {1e3 * itl['p50']:.1f} ms, p99 {1e3 * itl['p99']:.1f}",
        f"  hit rate {found['hit_rate']:.3f}, busy {low:.2f} to {high:.2f}, preemptions {requests['preempted']}",
    ]
    return "\n".join(rows)


# --- the page -------------------------------------------------------------------------------------------------------


def to_html(found: Mapping[str, Any], outcome: Outcome, slo: Slo) -> str:
    """One file that needs no other. Rows and spans are those of tandem.spacetime.model, in milliseconds."""
    least = outcome.end_s / _RESOLUTION
    every = max(1, len(outcome.jobs) // _DOTS)
    arriving: dict[str, list[float]] = {}
    for transfer in sorted(outcome.transfers, key=lambda transfer: transfer.end_s):
        spans = arriving.setdefault(transfer.target, [])
        spans += [TRANSFER, round(1e3 * transfer.begin_s, 1), round(1e3 * transfer.end_s, 1), 0.0]
    data = {
        "figures": found,
        "end": round(1e3 * outcome.end_s, 1),
        "resolution": round(1e3 * least, 1),
        "rows": [
            {
                "row": index,
                "id": worker.id,
                "role": worker.setup.role.value,
                "spans": _coarse(worker.activity.spans, least) + arriving.get(worker.id, []),
            }
            for index, worker in enumerate(outcome.workers)
        ],
        "ttft": [
            [round(job.offered.arrival_s, 3), round(job.ttft_s, 4), int(job.in_time(slo))]
            for job in outcome.jobs[::every]
            if job.ttft_s is not None
        ],
    }
    page = resources.files("tandem.sim").joinpath(_PAGE).read_text(encoding="utf-8")
    for mark, name in _ASSETS.items():
        page = page.replace(mark, spacetime.asset(name))
    return page.replace(_MARK, json.dumps(data, sort_keys=True, separators=(",", ":")).replace("</", "<\\/"))


def _coarse(spans: Sequence[Span], least: float) -> list[float]:
    """Flat: kind, begin, end, mean decoding sequences, kind, ... Spans shorter than ``least`` are joined with their
    neighbours to one of each kind, of the same length in all: the shares of time stay what they were."""
    drawn: list[float] = []
    group: list[Span] = []
    for span in spans:
        if group and (span.begin_s - group[-1].end_s > least or span.end_s - group[0].begin_s > least):
            drawn += _joined(group)
            group = []
        group.append(span)
    if group:
        drawn += _joined(group)
    return drawn


def _joined(group: Sequence[Span]) -> list[float]:
    flat: list[float] = []
    at = group[0].begin_s
    for kind in dict.fromkeys(span.kind for span in group):
        alike = [span for span in group if span.kind == kind]
        took = sum(span.end_s - span.begin_s for span in alike)
        level = sum(span.sequence_s for span in alike) / max(took, 1e-9)
        flat += [KINDS.index(kind), round(1e3 * at, 1), round(1e3 * (at + took), 1), round(level, 1)]
        at += took
    return flat
