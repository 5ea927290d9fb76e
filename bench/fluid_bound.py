"""What no scheduler can pass: the highest rate at which a clairvoyant fluid fleet holds TW attainment.

A linear program. It knows every arrival and every length, and its fleet is a fluid: work is cut as finely as it likes,
any worker takes up what another left, every prefix that any earlier prompt had is cached everywhere, KV moves in no
time, and a step costs its tokens only. Of a worker it keeps the profile's time per token, the KV room, and that one
worker at a time is busy with one request. It may serve shares of requests, and refuses what it likes.

    request i, share x_i        0 <= x_i <= 1; 0 if the prompt alone takes longer than its TTFT target
    prefill, in time bin b      0 <= y_ib <= seconds of b within [arrival, first token due];  sum_b y_ib = x_i * P_i
    decode, in time bin b       0 <= z_ib <= seconds of b within [arrival, last token due];   sum_b z_ib = x_i * D_i
    workers, in time bin b      sum_i (y_ib + z_ib) <= workers * seconds of b
    TW                          of requests and of tokens 0.9, of each quartile by prompt length 0.8
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from tandem.enginemodel.profile import context_sum
from tandem.sim.fleet import Hardware
from tandem.sim.metrics import LEAST_OF_QUARTILE, LEAST_SHARE, Slo
from tandem.sim.simulation import Outcome
from tandem.sim.workload import Offered, Workload

#: Bins per second: coarser ones only loosen the bound.
BINS_PER_S = 4
#: The search ends when the highest feasible rate is known this well.
PRECISION = 1.02


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of one worker that a request takes at the very least, and when they must be over (after its arrival)."""

    prefill_s: float
    prefill_due_s: float
    decode_s: float
    decode_due_s: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Where a fleet's worker seconds went in a simulated run, as shares of all of them."""

    prompts: float  # prompt tokens that no earlier prompt had
    recomputed: float  # prompt tokens that some earlier prompt had, on a worker that did not, or no longer
    decodes: float  # output tokens, by the same least price as in the bound
    rest_of_steps: float  # what steps cost beside their tokens: weights read for few sequences, prompts in small chunks
    idle: float

    def __str__(self) -> str:
        named = (
            ("new prompt tokens", self.prompts), ("recomputed ones", self.recomputed), ("output tokens", self.decodes),
            ("the rest of their steps", self.rest_of_steps), ("idle", self.idle),
        )  # fmt: skip
        return ", ".join(f"{name} {share:.0%}" for name, share in named)


def budget(outcome: Outcome, hardware: Hardware, slo: Slo) -> Budget:
    least = work_of(outcome.workload, hardware, slo)
    prompts_s = recomputed_s = decodes_s = 0.0
    for job, one in zip(outcome.jobs, least, strict=True):
        if job.first_token_s is not None:
            prompts_s += one.prefill_s
            recomputed_s += max(0.0, prefill_s(job.offered, job.cached_tokens, hardware) - one.prefill_s)
            decodes_s += one.decode_s
    busy_s = sum(worker.activity.busy_s for worker in outcome.workers)
    all_s = outcome.end_s * len(outcome.workers)
    parts = (prompts_s, recomputed_s, decodes_s, busy_s - prompts_s - recomputed_s - decodes_s, all_s - busy_s)
    return Budget(*(part / all_s for part in parts))


def work_of(workload: Workload, hardware: Hardware, slo: Slo) -> list[Work]:
    """With every prefix cached that an earlier prompt had."""
    seen: set[int] = set()
    found = []
    for request in workload.requests:
        hit = 0
        for block in request.hashes[: request.isl_tokens // workload.block_size]:
            if block not in seen:
                break
            hit += 1
        seen.update(request.hashes)
        found.append(_work(request, min(hit * workload.block_size, request.isl_tokens - 1), hardware, slo))
    return found


def prefill_s(request: Offered, cached: int, hardware: Hardware) -> float:
    """Of its tokens alone."""
    fresh = request.isl_tokens - cached
    return hardware.profile.p1 * fresh + hardware.profile.p2 * context_sum(cached, fresh)


def _work(request: Offered, cached: int, hardware: Hardware, slo: Slo) -> Work:
    profile = hardware.profile
    context = request.isl_tokens + request.osl_tokens / 2
    # A token decoded in a step of its kind has a share in what the step costs of itself: no smaller than in the largest
    # batch that keeps the pace, or that there is room for. Beside a prompt the step is paid for already.
    alone = profile.d1 + profile.d2 * context
    alone_s = max(
        alone * slo.tpot_s / max(1e-9, slo.tpot_s - profile.d0), alone + profile.d0 * context / hardware.kv_tokens
    )
    token_s = min(alone_s, profile.p1 + profile.p3 * context)
    due_s = slo.ttft_for(request.isl_tokens)
    more = request.osl_tokens - 1  # the first comes with the prompt
    return Work(prefill_s(request, cached, hardware), due_s, more * token_s, due_s + more * slo.tpot_s)


def feasible(workload: Workload, work: list[Work], workers: int) -> bool:
    """Whether the linear program has a solution for these arrivals."""
    requests = workload.requests
    count = len(requests)
    last_s = max(request.arrival_s + one.decode_due_s for request, one in zip(requests, work, strict=True))
    bins = int(last_s * BINS_PER_S) + 1

    parts = []  # (request, row of the balance, bin, seconds)
    needs = np.zeros((2, count))
    for i, (request, one) in enumerate(zip(requests, work, strict=True)):
        needs[:, i] = one.prefill_s, one.decode_s
        for row, due_s in ((i, one.prefill_due_s), (count + i, one.decode_due_s)):
            parts += [(row, b, room) for b, room in _bins(request.arrival_s, request.arrival_s + due_s)]
    rows, at, rooms = (np.array(column) for column in zip(*parts, strict=True))
    columns = count + np.arange(len(parts))
    size = count + len(parts)

    # sum of the parts - x_i * need = 0
    balance = coo_array(
        (
            np.concatenate([np.ones(len(parts)), -needs[0], -needs[1]]),
            (
                np.concatenate([rows, np.arange(count), count + np.arange(count)]),
                np.concatenate([columns, np.arange(count), np.arange(count)]),
            ),
        ),
        shape=(2 * count, size),
    )
    wanted = [*_tw(requests)]
    shares = np.array([row for row, _ in wanted])
    room = coo_array((np.ones(len(parts)), (at, columns)), shape=(bins, size))
    attained = coo_array(
        (-shares.ravel(), (np.repeat(np.arange(len(wanted)), count), np.tile(np.arange(count), len(wanted)))),
        shape=(len(wanted), size),
    )
    at_most = np.concatenate([np.full(bins, workers / BINS_PER_S), [-least for _, least in wanted]])
    most = [0.0 if one.prefill_s > one.prefill_due_s else 1.0 for one in work]
    answer = linprog(
        np.zeros(size),
        A_ub=vstack([room, attained]),
        b_ub=at_most,
        A_eq=balance,
        b_eq=np.zeros(2 * count),
        bounds=np.column_stack([np.zeros(size), np.concatenate([most, rooms])]),
        method="highs-ipm",
    )
    if answer.status not in (0, 2):
        raise RuntimeError(f"the solver gave up: {answer.message}")
    return answer.status == 0


def _bins(begin_s: float, end_s: float) -> Iterator[tuple[int, float]]:
    """Time bins that the window touches, and how much of each is in it."""
    for b in range(int(begin_s * BINS_PER_S), int(end_s * BINS_PER_S) + 1):
        yield b, max(0.0, min(end_s, (b + 1) / BINS_PER_S) - max(begin_s, b / BINS_PER_S))


def _tw(requests: tuple[Offered, ...]) -> Iterator[tuple[np.ndarray, float]]:
    """(what each request counts, what they must come to)."""
    count = len(requests)
    yield np.full(count, 1.0 / count), LEAST_SHARE
    tokens = np.array([float(request.isl_tokens + request.osl_tokens) for request in requests])
    yield tokens / tokens.sum(), LEAST_SHARE
    by_length = np.argsort([request.isl_tokens for request in requests], kind="stable")
    for quartile in np.array_split(by_length, 4):
        counts = np.zeros(count)
        counts[quartile] = 1.0 / len(quartile)
        yield counts, LEAST_OF_QUARTILE


def fluid_bound(workload: Workload, hardware: Hardware, workers: int, slo: Slo, start: float) -> float:
    """Requests/s, to 2 %, that no scheduler can pass. ``start``: a rate that one holds; 0 if even that is too much."""
    work = work_of(workload, hardware, slo)
    low, high = 0.0, start
    while feasible(workload.at_rate(high), work, workers):
        low, high = high, high * 1.25
        if low > len(workload.requests):
            return low  # all within a second: it is no load that could fail
    if not low:
        return 0.0
    while high / low > PRECISION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if feasible(workload.at_rate(middle), work, workers) else (low, middle)
    return high
