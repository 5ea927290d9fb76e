"""What a plan found, for people: a table, a chart for the terminal, a page with the chart as SVG. Pure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.core.types import Role
from tandem.sim.metrics import percentile
from tandem.sim.planning import Candidate, Found, Task, setup_of
from tandem.sim.simulation import Outcome
from tandem.sim.study import simulate

_WIDTH, _HEIGHT = 64, 16


@dataclass(frozen=True, slots=True)
class Plan:
    """All levels, and what is asked: ``need`` = the offered rate with its headroom, requests/s."""

    found: Sequence[Found]
    prices: Mapping[str, float]
    offered: float
    need: float

    def cost(self, found: Found) -> float:
        return found.level.cost(self.prices)

    @property
    def cheapest(self) -> list[Found]:
        """That serve what is needed, the cheapest first; of equal cost, the one that serves more."""
        enough = [found for found in self.found if found.rate >= self.need]
        return sorted(enough, key=lambda found: (self.cost(found), -found.rate))

    @property
    def best_per_gpu(self) -> Found | None:
        serving = [found for found in self.found if found.rate > 0]
        return max(serving, key=lambda found: found.rate / found.level.total, default=None)

    @property
    def frontier(self) -> list[Found]:
        """Those than which nothing cheaper serves as much, by cost."""
        found: list[Found] = []
        for each in sorted(self.found, key=lambda each: (self.cost(each), -each.rate)):
            if each.rate > 0 and (not found or each.rate > found[-1].rate):
                found.append(each)
        return found


def to_text(plan: Plan) -> str:
    lines = [f"{'GPUs':<22} {'$/h':>8} {'aggregated':>11} {'split':>8}  {'per GPU':>8}  best fleet"]
    for found in sorted(plan.found, key=lambda found: (plan.cost(found), found.level.gpus)):
        mark = "*" if found in plan.frontier else " "
        enough = "meets" if found.rate >= plan.need else ""
        rate, per_gpu = found.split_rate, found.rate / found.level.total
        fleet = str(found.best) if found.rate else "the SLO is met at no rate tried"
        lines.append(
            f"{found.level!s:<22} {plan.cost(found):8.2f} {found.aggregated_rate:11.2f} {rate:8.2f} {mark}"
            f"{per_gpu:8.3f}  {fleet} {enough}".rstrip()
        )
    lines += ["", "goodput in requests/s (simulated); * = nothing cheaper serves as much", "", *chart(plan), ""]
    lines.append(f"offered {plan.offered:.2f} requests/s; with headroom {plan.need:.2f}")
    cheapest = plan.cheapest
    if not cheapest:
        best = max((found.rate for found in plan.found), default=0.0)
        lines.append(f"no fleet of these GPUs serves that within the SLO; the most is {best:.2f} requests/s")
    for rank, found in enumerate(cheapest[:3]):
        what = "cheapest:" if not rank else "then:"
        lines.append(
            f"{what:<10}{found.best}: ${plan.cost(found):.2f}/h, goodput {found.rate:.2f} requests/s "
            f"({found.rate / plan.offered - 1:+.0%} over the offered rate)"
        )
    if (best_found := plan.best_per_gpu) is not None:
        lines.append(
            f"best goodput per GPU: {best_found.best}: {best_found.rate / best_found.level.total:.3f} requests/s a GPU"
        )
    return "\n".join(lines)


def chart(plan: Plan) -> list[str]:
    """Goodput over cost: A aggregated, D split, each in upper case on the frontier."""
    points = [(plan.cost(f), f.rate, ("d" if f.best.disaggregated else "a"), f in plan.frontier) for f in plan.found]
    most_cost = max((cost for cost, *_ in points), default=1.0) * 1.05
    most_rate = max([plan.need, *(rate for _, rate, *_ in points)]) * 1.1 or 1.0
    rows = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    need_row = _HEIGHT - 1 - int(plan.need / most_rate * _HEIGHT)
    rows[need_row] = ["-"] * _WIDTH
    for cost, rate, letter, front in sorted(points, key=lambda point: point[3]):
        x, y = int(cost / most_cost * _WIDTH), _HEIGHT - 1 - int(rate / most_rate * _HEIGHT)
        rows[max(0, y)][min(_WIDTH - 1, x)] = letter.upper() if front else letter
    labels = [f"{most_rate * (_HEIGHT - 0.5 - i) / _HEIGHT:8.1f}" if i % 4 == 0 else " " * 8 for i in range(_HEIGHT)]
    labels[need_row] = f"{'needed':>8}"
    lines = [f"{label} |{''.join(row).rstrip()}" for label, row in zip(labels, rows, strict=True)]
    axis = f"{'':8} +{'-' * _WIDTH}"
    foot = f"{'req/s':>8}  0{'$/h':>{_WIDTH // 2}}{most_cost:>{_WIDTH // 2 - 2}.0f}"
    legend = f"{'':8}  A/a aggregated, D/d prefill and decode apart; upper case: on the frontier"
    return [*lines, axis, foot, legend]


# -- what breaks first -------------------------------------------------------------------------------------------------


def what_breaks(candidate: Candidate, task: Task, goodput: float) -> list[str]:
    """How the fleet fares at its goodput and past it, and what its misses are."""
    lines = []
    for factor in (1.0, 1.2, 1.5, 2.0):
        rate = factor * goodput
        setup = setup_of(candidate, Task(task.workload.at_rate(rate), task.slo, task.seed))
        lines.append(f"  at {rate:8.2f}/s ({factor:.1f}x): {_fares(simulate(setup), task)}")
    return lines


def _fares(outcome: Outcome, task: Task) -> str:
    jobs, slo = outcome.jobs, task.slo
    refused = [job for job in jobs if job.refused]
    late = [job for job in jobs if not job.refused and not job.in_time(slo)]
    slow = [job for job in jobs if not job.refused and job.in_time(slo) and not job.attained(slo)]
    good = len(jobs) - len(refused) - len(late) - len(slow)
    busy = []
    for role in (Role.PREFILL, Role.DECODE):
        workers = [worker for worker in outcome.workers if worker.setup.role is role]
        if workers:
            share = sum(worker.activity.busy_s for worker in workers) / len(workers) / max(outcome.end_s, 1e-9)
            busy.append(f"{role.value} {share:.0%} busy")
    preempted = sum(job.preemptions for job in jobs)
    waits = sorted(job.placed_s - job.offered.arrival_s for job in jobs if job.placed_s is not None)
    misses = {
        "refused, as their first token would have been late": len(refused),
        "first token late": len(late),
        "tokens too slow": len(slow),
    }
    most = max(misses, key=lambda name: misses[name])
    what = f"{most}: {misses[most] / len(jobs):.1%}" if misses[most] else "nothing is missed"
    return (
        f"{good / len(jobs):.1%} attained; {what}; {', '.join(busy)}; queue p95 {1e3 * percentile(waits, 0.95):.0f} ms"
        f"{f'; {preempted} preemptions (KV room)' if preempted else ''}"
    )


# -- the page ----------------------------------------------------------------------------------------------------------

_W, _H, _PAD = 860, 420, 60


def to_html(plan: Plan, title: str, text: str, deployment: str) -> str:
    """One file that needs no other."""
    shown = "".join(f"<h2>{html.escape(name)}</h2><pre>{html.escape(body)}</pre>"
                    for name, body in (("Findings", text), ("Deployment file", deployment)) if body)  # fmt: skip
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title>"
        "<style>body{font:15px system-ui;max-width:920px;margin:2em auto;padding:0 1em}pre{background:#f4f4f4;"
        "padding:1em;overflow:auto;font-size:12px}text{font:12px system-ui}</style>"
        f"<h1>{html.escape(title)}</h1><p>Simulated, from the timing profiles named below.</p>{to_svg(plan)}{shown}\n"
    )


def to_svg(plan: Plan) -> str:
    most_cost = max((plan.cost(found) for found in plan.found), default=1.0) * 1.05
    most_rate = max([plan.need, *(found.rate for found in plan.found)]) * 1.1 or 1.0

    def at(cost: float, rate: float) -> tuple[float, float]:
        return _PAD + cost / most_cost * (_W - 2 * _PAD), _H - _PAD - rate / most_rate * (_H - 2 * _PAD)

    parts = [f'<svg viewBox="0 0 {_W} {_H}" role="img" xmlns="http://www.w3.org/2000/svg">']
    (x0, y0), (x1, _), (_, y1) = at(0, 0), at(most_cost, 0), at(0, most_rate)
    parts.append(f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#444"/>')
    for i in range(6):
        (x, _), (_, y) = at(most_cost * i / 5, 0), at(0, most_rate * i / 5)
        parts.append(f'<text x="{x:.0f}" y="{y0 + 18:.0f}" text-anchor="middle">{most_cost * i / 5:.0f}</text>')
        parts.append(f'<text x="{x0 - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{most_rate * i / 5:.1f}</text>')
    parts.append(f'<text x="{(x0 + x1) / 2:.0f}" y="{_H - 14}" text-anchor="middle">US dollars per hour</text>')
    parts.append(f'<text x="{x0}" y="{y1 - 10:.0f}">goodput, requests/s</text>')
    _, need = at(0, plan.need)
    parts.append(f'<path d="M{x0} {need:.1f}H{x1}" stroke="#c33" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{x1}" y="{need - 5:.0f}" text-anchor="end" fill="#c33">needed {plan.need:.2f}</text>')
    line = " ".join("{:.1f},{:.1f}".format(*at(plan.cost(f), f.rate)) for f in plan.frontier)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#999"/>')
    for found in plan.found:
        for candidate, rate, colour in (
            (found.aggregated, found.aggregated_rate, "#2a6fbb"),
            (found.split, found.split_rate, "#d98324"),
        ):
            if candidate is not None and rate > 0:
                x, y = at(plan.cost(found), rate)
                about = html.escape(f"{candidate}: {rate:.2f} requests/s, ${plan.cost(found):.2f}/h")
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{about}</title></circle>')
    parts.append(f'<text x="{x0 + 160}" y="{y1 - 10:.0f}" fill="#2a6fbb">aggregated</text>')
    parts.append(f'<text x="{x0 + 240}" y="{y1 - 10:.0f}" fill="#d98324">prefill and decode apart</text></svg>')
    return "".join(parts)
