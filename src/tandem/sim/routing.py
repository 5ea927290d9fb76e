"""Who decides where a request runs: the port between the simulation and a policy, and the router's own core behind it.

The simulation reports events; a router answers each with what to do now. Baselines are in ``baselines.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tandem.core.effects import Place, Recall, Refuse
from tandem.core.policy import Policy, RequestClass
from tandem.core.scheduler import Scheduler
from tandem.core.types import Plan, Request, RequestKey, Role, WorkerAddress, WorkerLoad, WorkerSpec
from tandem.errors import TandemError
from tandem.sim.metrics import Job, Slo
from tandem.sim.worker import SimWorker

_MODEL = "m"

#: Tokens of the prompt that each worker is believed to have cached.
Lookup = Callable[[Job], dict[str, int]]


@dataclass(frozen=True, slots=True)
class Placement:
    job: Job
    plan: Plan
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    job: Job
    code: str


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Stop it where it is and let it arrive again."""

    job: Job


Decided = Sequence[Placement | Refusal | Withdrawal]


class Router(Protocol):
    """Every method answers with what is decided now."""

    @property
    def wants_reports(self) -> bool: ...

    def arrive(self, job: Job, now: float) -> Decided: ...

    def prefill_done(self, job: Job, now: float) -> Decided:
        """The prompt is computed, on whichever worker."""
        ...

    def decode_started(self, job: Job, now: float) -> Decided:
        """A remotely computed prompt's KV has arrived on its decode worker."""
        ...

    def finished(self, job: Job, now: float) -> Decided: ...

    def report(self, load: WorkerLoad, now: float) -> None: ...

    def poll(self, now: float) -> Decided: ...

    def next_wakeup(self, now: float) -> float | None: ...


def spec_of(worker: SimWorker, slot: int) -> WorkerSpec:
    """What the worker would say when it registers."""
    kind, config = worker.setup.hardware, worker.model.config
    return WorkerSpec(
        address=WorkerAddress(worker.id, 1),
        model=_MODEL,
        role=worker.setup.role,
        slot=slot,
        block_size=config.block_size,
        dtype="bfloat16",
        kv_layout="sim",
        engine="sim",
        engine_version="1",
        max_model_len=config.context_limit,
        kv_blocks_total=config.num_blocks,
        kv_bytes_per_token=kind.kv_bytes_per_token,
        max_batched_tokens=config.max_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        perf_profile=kind.profile.name,
        kv_endpoint="sim",
        link_bytes_per_s=kind.link_bytes_per_s,
    )


class CoreRouter:
    """Drives ``tandem.core.scheduler.Scheduler`` as the live router does."""

    wants_reports = True

    def __init__(
        self,
        workers: Sequence[SimWorker],
        lookup: Lookup,
        slo: Slo | None,
        max_osl_tokens: int,
        policy: Policy | None = None,
        seed: int = 0,
        *,
        best_effort: bool = False,
        exact_lengths: bool = False,
    ) -> None:
        """``exact_lengths``: each request says how long its answer will be, which no real one knows."""
        request_class = RequestClass(timeout_s=600.0, best_effort=best_effort)
        if slo is not None:
            request_class = replace(
                request_class, ttft_slo_s=slo.ttft_s, ttft_slo_per_token_s=slo.ttft_per_token_s, tpot_slo_s=slo.tpot_s
            )
        self.scheduler = Scheduler(
            policy or Policy(),
            classes={"default": request_class},
            tenants={},
            rng=random.Random(seed),
            profiles={worker.setup.hardware.profile.name: worker.setup.hardware.profile for worker in workers},
        )
        self._lookup = lookup
        self._max_osl_tokens = max_osl_tokens
        self._exact_lengths = exact_lengths
        self._jobs: dict[str, Job] = {}
        for slot, worker in enumerate(workers):
            self.scheduler.worker_up(spec_of(worker, slot), 0.0)

    def arrive(self, job: Job, now: float) -> Decided:
        offered = job.offered
        request = Request(
            key=_key(job),
            model=_MODEL,
            isl_tokens=offered.isl_tokens,
            max_osl_tokens=offered.osl_tokens if self._exact_lengths else self._max_osl_tokens,
            arrival_s=now,
            timeout_s=600.0,
            tenant=offered.tenant,
            request_class=offered.request_class,
        )
        try:
            self.scheduler.submit(request, self._lookup(job), now)
        except TandemError as error:
            return [Refusal(job, error.code)]
        self._jobs[job.id] = job
        return self.poll(now)

    def prefill_done(self, job: Job, now: float) -> Decided:
        self.scheduler.prefill_done(_key(job), now)
        return self.poll(now)

    def decode_started(self, job: Job, now: float) -> Decided:
        self.scheduler.decode_started(_key(job), now)
        return self.poll(now)

    def finished(self, job: Job, now: float) -> Decided:
        self.scheduler.finished(_key(job), job.offered.osl_tokens, job.cached_tokens, now)
        self._jobs.pop(job.id, None)
        return self.poll(now)

    def report(self, load: WorkerLoad, now: float) -> None:
        self.scheduler.worker_load(load, now)

    def poll(self, now: float) -> Decided:
        decided: list[Placement | Refusal | Withdrawal] = []
        for effect in self.scheduler.poll(now):
            job = self._jobs[effect.request.key.id]
            match effect:
                case Place():
                    decided.append(Placement(job, effect.plan, effect.priority))
                case Recall():
                    decided.append(Withdrawal(job))
                case Refuse():
                    decided.append(Refusal(self._jobs.pop(job.id), effect.error.code))
        return decided

    def next_wakeup(self, now: float) -> float | None:
        return self.scheduler.next_wakeup(now)


def _key(job: Job) -> RequestKey:
    return RequestKey(job.id, job.attempt)


def by_role(workers: Sequence[SimWorker], role: Role) -> list[SimWorker]:
    return [worker for worker in workers if worker.setup.role is role]
