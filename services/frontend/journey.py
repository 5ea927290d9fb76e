"""The life of one request (one choice of it), from submission to its end, however many attempts that takes.

Pure: news from the cluster and the time go in, effects come out; no clock, no bus. Whatever is lost, repeated or
reordered on the way, the consumer sees every token exactly once, in order, and then exactly one end.

    WAITING    no router leads the model: wait for one, up to a grace
    SUBMITTED  published; a router queues it, or a worker is about to say ``placed``
    PLACED     a worker (the *holder*) has it; tokens are counted by ``seq`` within the attempt
    PAUSED     an attempt was lost; the next one starts at ``resume_s``
    STOPPING   the frontend has its answer (a stop string) and waits a moment for the finish with its figures
    ENDED

There is one way to recover: give the attempt up (Abandon) and submit again with attempt + 1 and a new rid, so that
frames of old attempts are unknown by themselves. A request whose tokens have been given out goes on from where it was
(prompt + tokens as the new prompt) when its sampling allows that; if not, it starts from scratch where nobody has seen
a token yet, and else ends with the error.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from enum import Enum

from msgspec.structs import replace

from services.frontend.effects import Abandon, AskAgain, Deliver, Effect, Ended, Opened, Restarted, Submit
from services.frontend.leaders import Leader, Leaders
from services.frontend.line import Line
from services.frontend.order import Consumer, Incident, Order, Outcome, Patience, Positions
from tandem import errors
from tandem.core.types import FinishReason, RequestKey, SamplingParams, WorkerAddress
from tandem.telemetry import spans
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec

#: Kept for a request's trace; a request that waits for minutes for a leader has no more to say.
MAX_INCIDENTS = 32


class State(Enum):
    WAITING = "waiting"
    SUBMITTED = "submitted"
    PLACED = "placed"
    PAUSED = "paused"
    STOPPING = "stopping"
    ENDED = "ended"


class Journey:
    """``new_rid`` gives this journey a number of its own (the old one becomes unknown); ``emit`` takes its effects."""

    __slots__ = (
        "_asked_s",
        "_cached_tokens",
        "_emit",
        "_finish",
        "_heard_s",
        "_leaders",
        "_lost_s",
        "_new_rid",
        "_opened",
        "_patience",
        "_pauses",
        "_questions_s",
        "_remote_failures",
        "_resume_s",
        "_since_s",
        "attempt",
        "avoid",
        "base",
        "consumer",
        "expected",
        "failures",
        "first_token_s",
        "holder",
        "incidents",
        "leader",
        "line",
        "look_s",
        "order",
        "outcome",
        "placed_s",
        "rid",
        "state",
        "submitted_s",
        "timings",
        "tokens",
    )

    def __init__(
        self,
        order: Order,
        consumer: Consumer,
        *,
        leaders: Leaders,
        patience: Patience,
        new_rid: Callable[[Journey], int],
        emit: Callable[[Effect], None],
    ) -> None:
        self.order = order
        self.consumer = consumer
        self.state = State.WAITING
        self.attempt = -1
        self.rid = 0
        self.leader: Leader | None = None
        self.holder: WorkerAddress | None = None
        #: Every token given out, over all attempts.
        self.tokens = array("I")
        #: How many of them were in this attempt's prompt already.
        self.base = 0
        #: ``seq`` of the next token within this attempt.
        self.expected = 0
        #: When the first token was given out; 0 = none was.
        self.first_token_s = 0.0
        #: Of the current attempt; 0 = no worker has taken it yet.
        self.submitted_s = self.placed_s = 0.0
        #: What was out of the ordinary, in order.
        self.incidents: list[Incident] = []
        #: As the last finish had them, also one of an attempt that failed.
        self.timings: bus_pb2.Timings | None = None
        self.outcome: Outcome | None = None
        #: Takes the plain tokens of a stream under way, in the consumer's place; closed by whatever else happens.
        self.line: Line | None = None
        self.avoid: set[str] = set()
        self.failures = 0
        #: Until then no tick can find anything.
        self.look_s = 0.0
        self._remote_failures = 0
        self._leaders = leaders
        self._patience = patience
        self._new_rid = new_rid
        self._emit = emit
        self._opened = False
        self._finish: bus_pb2.Finish | None = None
        self._cached_tokens = 0
        self._heard_s = 0.0  # last news of this request
        self._questions_s = 0.0  # first unanswered question since; 0 = none
        self._asked_s = 0.0  # last question
        self._since_s = 0.0  # entered this state
        self._resume_s = 0.0
        self._lost_s = 0.0  # when an attempt was first lost since a worker last had it; 0 = it is not
        self._pauses = 0  # since then

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.order.id, max(self.attempt, 0), self.order.choice)

    @property
    def heard_s(self) -> float:
        """Last news of this request: of its last token, once it has ended."""
        return self._heard_s

    @property
    def local_only(self) -> bool:
        # The log-probabilities of a prompt are there only where it is computed, and D computes none of it.
        # An embedding has no second phase.
        return self._remote_failures >= 2 or self.order.sampling.prompt_logprobs is not None or self.order.embed

    @property
    def remaining_sampling(self) -> SamplingParams:
        """The sampling of this attempt: what its prompt holds already is paid for."""
        sampling = self.order.sampling
        if not self.base:
            return sampling
        return replace(
            sampling,
            max_tokens=sampling.max_tokens - self.base,
            min_tokens=max(0, sampling.min_tokens - self.base),
        )

    # -- what the consumer wants -----------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        self._submit(now)

    def cancel(self) -> None:
        """Nobody waits for it any more: ends at once, as Cancelled."""
        if self.state is State.ENDED:
            return
        if self.state is not State.STOPPING:
            self._abandon()
        self.line = None
        self.state = State.ENDED
        self.outcome = Outcome(FinishReason.ABORT, len(self.tokens), error=errors.Cancelled("cancelled by the client"))
        self._emit(Ended(self, self.outcome))

    def give_up(self, error: errors.TandemError) -> None:
        """The frontend leaves and waits no longer: what is not over ends with ``error``."""
        if self.state is State.STOPPING:
            self._end_stopped(None)
        elif self.state is not State.ENDED:
            self._abandon()
            self._fail(error)

    @property
    def flows(self) -> bool:
        """Plain tokens come, one after the other."""
        begun = self.state is State.PLACED and self.first_token_s > 0.0 and self._finish is None
        return begun and self.order.sampling.logprobs is None

    def open_line(self, line: Line) -> None:
        """Where tokens flow; the consumer has heard all of them so far."""
        if self.flows:
            self.line = line

    def stop(self, now: float) -> None:
        """The consumer has what it wants: end as STOP, soon."""
        if self.state in (State.ENDED, State.STOPPING):
            return
        self._abandon()
        self._enter(State.STOPPING, now)

    # -- what the cluster says about the current attempt -----------------------------------------------------------

    def on_placed(self, worker: WorkerAddress, now: float) -> None:
        # Once tokens flow, their sender is the holder: a late word of the prefill worker changes nothing.
        self._taken_by(worker if self.expected == 0 else self.holder or worker, now)

    def on_tokens(
        self,
        worker: WorkerAddress,
        seq: int,
        tokens: list[int],
        positions: Positions | None,
        prompt_positions: Positions | None,
        now: float,
    ) -> None:
        line = self.line
        if line is not None:  # by far the most: the next token of a stream under way, which needs no effect
            if worker is self.holder and seq == self.expected and positions is None and line.take(tokens):
                self.expected += len(tokens)
                self.tokens.fromlist(tokens)
                self._heard_s = now
                self._questions_s = 0.0
                return None
            self.line = None
        if not self._taken_by(worker, now):
            return None
        known = self.expected - seq
        if known < 0:
            return self._ask_about_gap(now)
        if known >= len(tokens):
            return None
        if self.order.sampling.logprobs is not None and (positions is None or len(positions) < len(tokens)):
            # Kept by nobody once their frame is lost; tokens without them are not what was asked for.
            return self._lose(errors.UnknownRequest("log-probabilities were lost on the way"), now)
        new = tokens[known:] if known else tokens
        if not self.tokens:
            self.first_token_s = self.first_token_s or now
        self.expected += len(new)
        self.tokens.fromlist(new)
        self._emit(Deliver(self, new, positions[known:] if positions is not None else None, prompt_positions))
        if self._finish is not None:
            self._complete_if_whole(now)
        return None

    def on_finish(self, worker: WorkerAddress, finish: bus_pb2.Finish, now: float) -> None:
        if finish.HasField("timings"):
            self.timings = finish.timings
        if self.state is State.STOPPING:
            return self._end_stopped(finish)
        if finish.HasField("error") or finish.reason == types_pb2.FINISH_REASON_ERROR:
            return self.on_error(worker, _error_of(finish), now)
        if not self._taken_by(worker, now):
            return None
        if finish.reason == types_pb2.FINISH_REASON_ABORT:
            return self._lose(errors.WorkerLostError(f"worker {worker.id} gave the request up"), now)
        self.line = None
        self._finish = finish
        return self._complete_if_whole(now)

    def on_error(self, worker: WorkerAddress, error: errors.TandemError, now: float) -> None:
        """A refusal by the router or a worker, or an attempt that failed. ``worker`` is who says so."""
        if self.state is State.STOPPING:
            return self._end_stopped(None)
        if self.state not in (State.SUBMITTED, State.PLACED):
            return None
        if isinstance(error, errors.UnknownRequest) and self.holder is not None and self.holder.id != worker.id:
            return None  # asked the wrong one: it has moved on since
        if isinstance(error, errors.NoLeader):
            self._leaders.gone(self.order.model, worker.id)
            return self._enter(State.WAITING, now)
        # A worker's plain refusal (it drains) is not the cluster's: another may take it. Routers have no incarnation.
        blames_worker = isinstance(error, errors.EngineFailed | errors.WorkerLostError) or type(error) is errors.Refused
        if blames_worker and worker.incarnation:
            self.avoid.add(worker.id)
        if isinstance(error, errors.HandoffFailed):
            self._remote_failures += 1
        return self._lose(error, now)

    # -- what happens around it ------------------------------------------------------------------------------------

    def on_worker_lost(self, worker: str, incarnation: int | None, now: float) -> None:
        """``incarnation`` None: whichever it is."""
        holder = self.holder
        if self.state is State.STOPPING:
            return self._end_stopped(None)
        if self.state is not State.PLACED or holder is None or holder.id != worker:
            return
        if incarnation is None or holder.incarnation <= incarnation:
            self.avoid.add(worker)
            self._lose(errors.WorkerLostError(f"worker {worker} is gone"), now)

    def on_leader(self, now: float) -> None:
        """The model has a new leader, or its old one is back."""
        leader = self._leaders.current(self.order.model, now)
        if self.state is State.WAITING or (self.state is State.SUBMITTED and leader != self.leader):
            self._resubmit(now)

    def on_bounced(self, router: str, now: float) -> None:
        """Nobody listened at the router that this was submitted to."""
        if self.state is State.SUBMITTED and self.leader is not None and self.leader.router == router:
            self._enter(State.WAITING, now)

    def on_bus_back(self, now: float) -> None:
        """What was under way when the bus went is lost: ask, or submit again."""
        if self.state is State.SUBMITTED:
            self._resubmit(now)
        elif self.state is State.PLACED:
            self._heard_s, self._questions_s = now, 0.0
            self._ask(now)
        elif self.state is State.WAITING:
            self._since_s = now

    def on_tick(self, now: float, *, bus: bool = True) -> None:
        """``bus`` False: it is away, and silence means nothing."""
        if self.state is State.ENDED:
            return
        if now >= self.order.deadline_s and self.state is not State.STOPPING:
            return self._time_out(now)
        if not bus:
            return
        if self.state is State.PLACED:
            self._tick_placed(now)
        elif self.state is State.SUBMITTED:
            self._tick_submitted(now)
        elif self.state is State.WAITING:
            if self._leaders.current(self.order.model, now) is not None:
                self._resubmit(now)
            elif now - self._since_s >= self._patience.leader_grace_s:
                self._fail(errors.NoLeader(f"no router leads model {self.order.model!r} at the moment"))
        elif self.state is State.PAUSED:
            if now >= self._resume_s:
                self._submit(now)
        elif now - self._since_s >= self._patience.stop_s:
            self._end_stopped(None)

    def on_bus_gone(self) -> None:
        """The bus has been away for longer than its grace."""
        if self.state is State.STOPPING:
            self._end_stopped(None)
        elif self.state is not State.ENDED:
            self._fail(errors.BusUnavailable("the message bus is not reachable"))

    def refuse(self, error: errors.TandemError) -> None:
        """The current attempt could not be published, and no other could be."""
        if self.state is not State.ENDED:
            self._fail(error)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _submit(self, now: float) -> None:
        self.leader = self._leaders.current(self.order.model, now)
        if self.leader is None:
            return self._enter(State.WAITING, now)
        self.attempt += 1
        self.rid = self._new_rid(self)
        self.base = len(self.tokens)
        self.expected = 0
        self.holder = None
        self.timings = self._finish = None
        self.submitted_s, self.placed_s = now, 0.0
        if self.attempt:
            self._note(spans.MIGRATION if self.base else spans.RETRY, now)
        self._enter(State.SUBMITTED, now)
        self._emit(Submit(self))
        return None

    def _resubmit(self, now: float) -> None:
        """Again, through no fault of the attempt: costs no failure."""
        if self.attempt >= 0:
            self._note(spans.FAILURE, now, reason="nothing was heard of it, or its router changed")
            self._abandon()
        self._submit(now)

    def _lose(self, error: errors.TandemError, now: float) -> None:
        """The attempt is over; another follows if the error, the budget and the sampling allow it."""
        recovering = isinstance(error, errors.NoWorkers) and self.failures > 0
        if not (isinstance(error, errors.Lost) or recovering or type(error) is errors.Refused):
            return self._fail(error)
        self._note(spans.FAILURE, now, error=error)
        self._abandon()
        reason = self._ended_without_word()
        if reason is not None:
            return self._end(Outcome(reason, len(self.tokens), self._cached_tokens))
        self._lost_s = self._lost_s or now
        if recovering:
            if now - self._lost_s >= self._patience.recovery_grace_s:
                return self._fail(error)
        else:
            self.failures += 1
        if self.failures > self._patience.max_failures:
            return self._fail(error)
        if self.tokens and not self.order.sampling.continuable:
            if not self.order.restartable:
                return self._fail(error)
            del self.tokens[:]
            self._emit(Restarted(self))
        if self.failures == 1 and not recovering:
            return self._submit(now)
        self._enter(State.PAUSED, now)
        self._resume_s = now + min(1.0, 0.05 * 2**self._pauses)
        self._pauses += 1
        return None

    def _ended_without_word(self) -> FinishReason | None:
        """All tokens are here and only the finish is missing: nothing is left to compute."""
        if self.order.embed:
            return None  # the finish is the answer
        if len(self.tokens) >= self.order.sampling.max_tokens:
            return FinishReason.LENGTH
        if self.tokens and self.tokens[-1] in self.order.end_tokens:
            return FinishReason.STOP if len(self.tokens) > self.order.sampling.min_tokens else None
        return None

    def _complete_if_whole(self, now: float) -> None:
        finish = self._finish
        assert finish is not None
        if self.expected < finish.output_tokens:
            return self._ask_about_gap(now)
        self._cached_tokens = min(finish.cached_tokens, self.order.isl_tokens)
        stop_token = finish.stop_token_id if finish.HasField("stop_token_id") else None
        reason = codec.finish_from_wire(finish.reason)
        self._end(
            Outcome(
                reason,
                len(self.tokens),
                self._cached_tokens,
                stop_token,
                timings=finish.timings,
                embedding=finish.embedding,
            )
        )
        return None

    def _end_stopped(self, finish: bus_pb2.Finish | None) -> None:
        cached = min(finish.cached_tokens, self.order.isl_tokens) if finish is not None else 0
        timings = finish.timings if finish is not None else None
        self._end(Outcome(FinishReason.STOP, len(self.tokens), cached, timings=timings))

    def _tick_placed(self, now: float) -> None:
        silent_since = max(self._heard_s, self._asked_s)
        if self._questions_s and now - self._heard_s >= self._patience.lost_s:
            assert self.holder is not None
            self.avoid.add(self.holder.id)
            self._lose(errors.WorkerLostError(f"worker {self.holder.id} does not answer"), now)
        elif now - silent_since >= self._patience.stall_s:
            self._ask(now)
        elif not self._questions_s:
            self.look_s = min(self.order.deadline_s, silent_since + self._patience.stall_s)

    def _tick_submitted(self, now: float) -> None:
        model = self.order.model
        if self._leaders.current(model, now) is None:
            if self._leaders.silent_s(model, now) >= self._patience.leader_grace_s:
                self._abandon()
                self._fail(errors.NoLeader(f"the router that leads model {model!r} does not answer"))
        elif now - self._since_s >= self._patience.requery_s:
            self._resubmit(now)

    def _ask_about_gap(self, now: float) -> None:
        if now - self._asked_s >= self._patience.repair_s:
            self._ask(now)

    def _ask(self, now: float) -> None:
        assert self.holder is not None
        self.line = None  # its silence is one
        self.look_s = 0.0
        self._asked_s = now
        self._questions_s = self._questions_s or now
        self._note(spans.GAP, now)
        self._emit(AskAgain(self, self.holder, self.expected))

    def _time_out(self, now: float) -> None:
        waited = now - self.order.arrival_s
        if self.state is State.PLACED or self.tokens:
            error: errors.TandemError = errors.RequestTimeout(f"not finished within {waited:.0f} s")
        else:
            error = errors.QueueTimeout(f"not started within {waited:.0f} s")
        self._abandon()
        self._fail(error)

    def _taken_by(self, worker: WorkerAddress, now: float) -> bool:
        """``worker`` shows that it has the current attempt. False when no attempt is under way."""
        if self.state is State.SUBMITTED:
            self._enter(State.PLACED, now)
            self.placed_s = now
            self._lost_s, self._pauses = 0.0, 0
        elif self.state is not State.PLACED:
            return False
        self.holder = worker
        self._heard_s = now
        self._questions_s = 0.0
        if not self._opened:
            self._opened = True
            self._emit(Opened(self))
        return True

    def _abandon(self) -> None:
        if self.attempt >= 0:
            self._emit(Abandon(self, self.attempt))

    def _fail(self, error: errors.TandemError) -> None:
        self._end(Outcome(FinishReason.ERROR, len(self.tokens), self._cached_tokens, error=error))

    def _end(self, outcome: Outcome) -> None:
        self.line = None
        self.state = State.ENDED
        self.outcome = outcome
        self._emit(Ended(self, outcome))

    def _note(
        self, kind: spans.Event, now: float, *, error: errors.TandemError | None = None, reason: str = ""
    ) -> None:
        if len(self.incidents) < MAX_INCIDENTS:
            holder = self.holder.id if self.holder is not None else ""
            self.incidents.append(Incident(kind, now, self.attempt, holder, error, reason, len(self.tokens)))

    def _enter(self, state: State, now: float) -> None:
        self.line = None
        self.look_s = 0.0
        self.state = state
        self._since_s = now
        self._heard_s = now
        self._questions_s = 0.0


def _error_of(finish: bus_pb2.Finish) -> errors.TandemError:
    if finish.HasField("error"):
        return codec.error_from_wire(finish.error)
    return errors.EngineFailed("the engine ended the request with an error")
