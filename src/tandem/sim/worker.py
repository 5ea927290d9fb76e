"""One engine model on the virtual clock. Runs of plain decode steps are done in one go and cut short when needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.core.types import StepTiming, WorkerLoad
from tandem.enginemodel.content import HashContent
from tandem.enginemodel.engine_model import EngineModel
from tandem.enginemodel.link import Link
from tandem.enginemodel.profile import step_s
from tandem.enginemodel.sequence import ModelConfig, StepResult
from tandem.enginemodel.sequence import Sequence as ModelSequence
from tandem.sim.fleet import WorkerSetup
from tandem.sim.index import LateIndex
from tandem.sim.metrics import Activity

#: Step timings that a load report carries at most.
_REPORTED_STEPS = 2
#: Handoffs are claimed as soon as made; their leases do not matter here.
_LEASE_S = 1e9


@dataclass(slots=True)
class _Quiet:
    """A run of decode steps under way, not yet done in the model."""

    begin: float
    steps: int
    evicts: bool


class SimWorker:
    """``schedule(at, worker)`` asks the simulation to call ``worker.tick(at)`` then; a later call replaces it."""

    def __init__(
        self, setup: WorkerSetup, block_size: int, schedule: Callable[[float, SimWorker], None], coalesce: bool = True
    ) -> None:
        self.setup = setup
        self.id = setup.id
        kind = setup.hardware
        num_blocks = kind.kv_tokens // block_size
        config = ModelConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=kind.max_num_seqs,
            max_batched_tokens=setup.chunk_tokens,
            max_model_len=min(kind.max_model_len, num_blocks * block_size),
            lease_s=_LEASE_S,
        )
        self.model = EngineModel(config, setup.timing)
        self.link_in = Link(kind.link_bytes_per_s)
        self.link_out = Link(kind.link_bytes_per_s)
        self.activity = Activity(setup.id)
        self.index: LateIndex | None = None  # to be told of the cache's changes
        self._schedule = schedule
        self._coalesce = coalesce
        self._timings: deque[StepTiming] = deque(maxlen=_REPORTED_STEPS)
        self._quiet: _Quiet | None = None
        self._step: StepResult | None = None
        self._telling = False  # the news of a step are being told, and may bring more work before the next begins
        self.next_tick: float | None = None

    # -- work in -------------------------------------------------------------------------------------------------

    def submit(self, sequence: ModelSequence, now: float) -> None:
        """ValueError if it does not fit at all."""
        self.interrupt(now)
        self.model.submit(sequence)

    def interrupt(self, now: float) -> None:
        """Something is about to change at ``now``: a quiet run ends with the step that is under way."""
        self.sync(now)
        if self._quiet is not None:
            self._step = StepResult()
            self._at(self._quiet.begin)
            self._quiet = None

    def sync(self, now: float) -> None:
        """Do the steps of a quiet run that have begun by ``now``, as if each had been done when it began."""
        quiet = self._quiet
        if quiet is None or quiet.begin >= now:
            return
        done = self._steps_until(quiet, now)
        result = self._run_quiet(quiet, done)
        quiet.begin += result.duration_s
        quiet.steps -= done
        if not quiet.steps:
            self._quiet, self._step = None, result

    def _steps_until(self, quiet: _Quiet, now: float) -> int:
        """Least number of steps that ends at or after ``now``, within the run."""
        model, begin = self.model, quiet.begin
        # Steps grow by so little that the first one's length nearly says it; the clock has the last word.
        steps = min(quiet.steps, max(1, int((now - begin) / model.quiet_s(1))))
        while steps > 1 and begin + model.quiet_s(steps - 1) >= now:
            steps -= 1
        while steps < quiet.steps and begin + model.quiet_s(steps) < now:
            steps += 1
        return steps

    def _run_quiet(self, quiet: _Quiet, steps: int) -> StepResult:
        batch, kv_tokens = len(self.model.decoding), self.model.decode_kv_tokens
        result = self.model.run_quiet(steps, quiet.begin)
        for done in range(max(0, steps - _REPORTED_STEPS), steps):
            read = kv_tokens + done * batch
            self._timings.append(StepTiming(step_s(self.model.profile, 0, 0, batch, read), 0, 0, batch, read))
        self._account(result, quiet.begin)
        return result

    # -- time ----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._quiet is not None or self._step is not None or self._telling

    def tick(self) -> StepResult:
        """The step under way (or run of steps) ends: what came of it. Call ``told`` and ``go_on`` afterwards."""
        self._telling = True
        if self._quiet is not None:
            quiet, self._quiet = self._quiet, None
            return self._run_quiet(quiet, quiet.steps)
        assert self._step is not None
        result, self._step = self._step, None
        return result

    def told(self) -> None:
        self._telling = False

    def go_on(self, now: float) -> StepResult | None:
        """Begin the next step unless one is under way. Returns a result whose pulls and releases start now."""
        if self.busy or not self.model.has_work:
            return None
        steps = self.model.quiet_steps() if self._coalesce else 0
        if steps:
            self._quiet = _Quiet(now, steps, self.model.evicts(steps))
            self._at(now + self.model.quiet_s(steps))
            return None
        result = self.model.step(now)
        if result.steps:
            self._step = result
            if result.timing is not None:
                self._timings.append(result.timing)
            self._account(result, now)
            self._at(now + result.duration_s)
        return result

    def _at(self, when: float) -> None:
        self.next_tick = when
        self._schedule(when, self)

    def _account(self, result: StepResult, begin: float) -> None:
        if result.timing is not None:
            self.activity.add(begin, result, result.timing)
        if self.index is not None:
            self.index.note(self.id, begin + result.duration_s, result.events)

    # -- readings ------------------------------------------------------------------------------------------------

    def cached_tokens(self, hashes: Sequence[int], now: float) -> int:
        """Length of the cached prefix. The cache is prefix-closed, so its end is found by halving."""
        if self._quiet is not None and self._quiet.evicts:
            self.sync(now)
        is_cached = self.model.pool.is_cached
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if is_cached(hashes[middle - 1]):
                low = middle
            else:
                high = middle - 1
        return low * self.model.config.block_size

    def load(self, now: float) -> WorkerLoad:
        """A load report, as a live worker sends it."""
        self.sync(now)
        model = self.model
        tokens, context = model.pending_prefill()
        timings = tuple(self._timings)
        self._timings.clear()
        return WorkerLoad(
            worker=self.id,
            incarnation=1,
            waiting_requests=len(model.sequences) - model.num_running,
            running_requests=model.num_running,
            pending_prefill_tokens=tokens,
            pending_prefill_context_tokens=context,
            kv_blocks_used=model.pool.num_used,
            kv_blocks_total=model.config.num_blocks,
            kv_tokens=model.decode_kv_tokens,
            steps=timings,
        )


def sequence(
    request_id: str,
    isl_tokens: int,
    osl_tokens: int,
    hashes: Sequence[int],
    *,
    priority: int = 0,
    produce_handoff: bool = False,
    remote: bool = False,
) -> ModelSequence:
    """A request as the model takes it."""
    content = HashContent(isl_tokens, hashes)
    return ModelSequence(
        request_id, content, osl_tokens, priority, produce_handoff=produce_handoff, remote=remote
    )  # fmt: skip
