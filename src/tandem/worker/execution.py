"""Runs what a worker is given: from an assignment or a handoff to the last token.

One flow for both roles; what differs is which leg the router sends. Prefill leg: compute the prompt, hand the KV to
the decode worker named in the assignment. Local leg: do it all. Handoff: claim, pull, decode; when the pull cannot be
trusted or does not come, prefill here instead. Whatever fails reaches the frontend as a Finish with a typed error,
and the frontend, who owns the request, submits again.

What comes in one turn of the event loop, assignments or news of the engine, goes through stage by stage and not request
by request: a stage's code is in the core's caches from the second on (docs/decisions/stages.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from tandem.adapters.bus import Bus
from tandem.core.blocks import token_ids
from tandem.core.types import RequestKey, SamplingParams
from tandem.engine.protocol import Engine, EngineOutput, EngineRequest, KvHandoff
from tandem.errors import (
    BusUnavailable,
    HandoffFailed,
    InternalError,
    InvalidRequest,
    PayloadTooLarge,
    Refused,
    StaleEpoch,
    TandemError,
    UnknownRequest,
)
from tandem.telemetry.propagation import trace_of
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects
from tandem.worker.answers import abort_finish, add_timings, end_phase, error_finish, logprobs_update
from tandem.worker.handoffs import OpenHandoff, OpenHandoffs, Peers
from tandem.worker.outbox import Outbox
from tandem.worker.pulls import Pulls
from tandem.worker.request_table import RequestTable, Running
from tandem.worker.tracing import WorkerTraces

log = logging.getLogger(__name__)

Spawn = Callable[[Coroutine[Any, Any, None]], object]
#: Bytes of sampling parameters that are worth remembering: grammars and biases may have megabytes.
_SHORT_SAMPLING = 256


class Assigned(NamedTuple):
    """An assignment, read."""

    message: bus_pb2.Assignment
    submit: bus_pb2.Submit
    prompt: Sequence[int]
    sampling: SamplingParams


class Execution:
    def __init__(
        self,
        *,
        bus: Bus,
        cluster: str,
        worker: str,
        engine: Engine,
        outbox: Outbox,
        table: RequestTable,
        handoffs: OpenHandoffs,
        peers: Peers,
        traces: WorkerTraces,
        spawn: Spawn,
        now: Callable[[], float],
        hop_timeout_s: float,
        lease_s: float,
    ) -> None:
        self._bus = bus
        self._cluster = cluster
        self._worker = worker
        self._engine = engine
        self._outbox = outbox
        self._table = table
        self._handoffs = handoffs
        self._peers = peers
        self._traces = traces
        self._spawn = spawn
        self._now = now
        self._pulls = Pulls(
            peers,
            worker,
            hop_timeout_s=hop_timeout_s,
            lease_s=lease_s,
            spawn=spawn,
            now=now,
            start=self._decode_from,
            fall_back=self._prefill_here,
            failed=lambda reason: self.on_kv_failure(reason),
        )
        self._runs = 0
        #: What the engine has said in this turn: request, name of the engine's run, news.
        self._news: list[tuple[Running, str, EngineOutput]] = []
        outbox.before_flush = self.work_off
        self.epoch = 0
        self.draining = False
        #: (prompt tokens that the index said were cached here, those that were)
        self.on_cached: Callable[[int, int], None] = lambda told, found: None
        #: For the metrics: a request has ended here; one was refused (error code); a KV handoff came to nothing (why).
        self.on_end: Callable[[Running], None] = lambda running: None
        self.on_refusal: Callable[[str], None] = lambda code: None
        self.on_kv_failure: Callable[[str], None] = lambda reason: None

    # -- what arrives ----------------------------------------------------------------------------------------------

    def assignments(self, messages: Iterable[bus_pb2.Assignment]) -> None:
        """All that came together. DecodeError, ValueError or InvalidRequest once the others were taken, if one of them
        is none."""
        came: list[Assigned] = []
        failure: Exception | None = None
        for message in messages:
            try:
                came.append(_read(message))
            except (DecodeError, ValueError, InvalidRequest) as error:
                failure = error
        self._take(came)
        if failure is not None:
            raise failure

    def _take(self, came: Sequence[Assigned]) -> None:
        taken = [(running, assigned) for assigned in came if (running := self._assigned(assigned)) is not None]
        for running, assigned in taken:
            self._submit(running, assigned.prompt, assigned.sampling)
        for running, assigned in taken:
            self._taken(running, others_wait=assigned.message.others_wait)

    def _assigned(self, assigned: Assigned) -> Running | None:
        message, submit = assigned.message, assigned.submit
        epoch = message.epoch
        if epoch < self.epoch:
            self._refuse(submit, StaleEpoch(f"epoch {epoch} is over; {self.epoch} is known"))
            return None
        self.epoch = epoch
        if self.draining:
            self._refuse(submit, Refused(f"worker {self._worker} is draining"))
            return None
        running = self._admit(submit, message, message.leg)
        if running is not None and running.leg == bus_pb2.LEG_PREFILL:
            running.peer = message.decode.id
            running.produces = message
        return running

    def handoff(self, message: bus_pb2.Handoff) -> None:
        submit = bus_pb2.Submit.FromString(message.assignment.submit)
        kv = KvHandoff(message.kv.handoff_id, message.kv.engine_id, message.kv.num_tokens, message.kv.params)
        running = self._admit(submit, message.assignment, bus_pb2.LEG_PREFILL)
        if running is None:
            # A repeated one is in hand: whoever took it gives it back. Any other is not wanted any more.
            if self._table.get(codec.key_from_wire(submit.key)) is None:
                self._spawn(self._peers.release(message.prefill, kv, pulled=False))
            return
        running.peer = message.prefill.id
        running.pulls = True
        running.timings.CopyFrom(message.timings)
        self._taken(running, others_wait=message.assignment.others_wait)
        self._pulls.take(running, message.prefill, kv)

    def repair(self, message: bus_pb2.Repair) -> None:
        """Tokens from ``from_seq`` on, and the finish if there was one. A request that was handed over is asked of its
        new holder; if that has not claimed it yet, the handoff may be what got lost, and goes out again."""
        running = self._table.get(codec.key_from_wire(message.key))
        if running is None:
            error = UnknownRequest(f"worker {self._worker} does not know this request")
            self._outbox.finish(message.frontend, error_finish(message.rid, error))
        elif running.handed_over:
            for handoff_id, entry in self._handoffs.unclaimed(running.key):
                self._send_handoff(handoff_id, entry)
            forward = bus_pb2.WorkerMessage(repair=message)
            self._send(running.peer, forward, about=f"r:{message.rid}:{message.frontend}")
        else:
            missing = running.tokens[message.from_seq :]
            if missing:
                self._outbox.tokens(message.frontend, message.rid, message.from_seq, missing)
            if running.finish is not None:
                self._outbox.finish(message.frontend, running.finish)
            elif not missing:
                # Nothing new, but it is here: a long prompt is no reason to give the worker up.
                self._outbox.placed(message.frontend, message.rid, running.leg)

    def abort(self, request_id: str, max_attempt: int, choice: int | None = None) -> int:
        """Ends every attempt up to ``max_attempt``, also one that has yet to arrive, of one choice or (None) of all.

        Returns how many were running.
        """
        found = self._table.fence(request_id, max_attempt, choice, self._now())
        for running in found:
            if self._pulls.is_claiming(running):
                self._give_up(running, abort_finish(running.rid))
            else:
                self._engine.abort(running.engine_id)
        self._handoffs.cancel(request_id, max_attempt, choice)
        return len(found)

    def taint(self, message: bus_pb2.Taint) -> None:
        """KV pulled from that prefill worker is not to be trusted: its streams fail, the cache they fed goes."""
        for running in self._table.unfinished():
            if running.leg == bus_pb2.LEG_PREFILL and running.peer == message.prefill.id:
                error = HandoffFailed(f"KV from {message.prefill.id} was read after its lease")
                self.on_kv_failure("tainted")
                log.error("%s: %s (trace %s)", running.engine_id, error.message, trace_of(running.submit.traceparent))
                self._engine.abort(running.engine_id)
                self._give_up(running, error_finish(running.rid, error))
        self._spawn(self._engine.reset_prefix_cache())

    def warn_peers(self) -> None:
        """Our engine saw a read after the lease's end: everyone who pulled from us lately must know."""
        taint = bus_pb2.WorkerMessage(taint=bus_pb2.Taint(prefill=self._outbox.ref))
        for worker in self._handoffs.recent_peers():
            self._send(worker, taint, about="t:")

    def bounced(self, about: str) -> None:
        """Nobody listened to a message of ours."""
        kind, _, rest = about.partition(":")
        if kind == "f":
            for running in self._table.of_frontend(rest):
                log.info("frontend %s is gone: aborting %s", rest, running.key.id)
                self.abort(running.key.id, running.key.attempt, running.key.choice)
        elif kind == "h":
            entry = self._handoffs.get(rest)
            self._handoffs.release(rest, pulled=False)
            if entry is not None:
                self._handoff_undeliverable(entry)
        elif kind == "r":
            rid, _, frontend = rest.partition(":")
            error = HandoffFailed("the decode worker is gone")
            self._outbox.finish(frontend, error_finish(int(rid), error))

    def tell_of(self, keys: Iterable[RequestKey]) -> None:
        """The router has heard nothing of these for long."""
        for key in keys:
            running = self._table.get(key)
            if running is None:
                self._outbox.event(key, bus_pb2.PHASE_UNKNOWN)
            else:
                self._event(running, end_phase(running) if running.finish is not None else _phase(running))

    def tell_again(self) -> None:
        """The bus is back, and what was said around its outage may have reached nobody. All of this may be repeated:
        lifecycle events, and handoffs that nobody has claimed. Tokens are asked for by who misses them."""
        for running in self._table:
            self._event(running, end_phase(running) if running.finish is not None else _phase(running))
        for handoff_id, entry in self._handoffs.unclaimed():
            self._send_handoff(handoff_id, entry)

    # -- running ---------------------------------------------------------------------------------------------------

    def _admit(self, submit: bus_pb2.Submit, assignment: bus_pb2.Assignment, leg: bus_pb2.Leg) -> Running | None:
        key = codec.key_from_wire(submit.key)
        running = Running(
            key=key,
            frontend=submit.frontend,
            rid=submit.rid,
            submit=submit,
            leg=leg,
            accepted_at=self._now(),
            engine_id=self._new_engine_id(key),
            isl_tokens=submit.isl_tokens,
            embed=submit.embed,
            predicted_cached_tokens=assignment.predicted_cached_tokens,
            priority=assignment.priority,
        )
        running.answer.rid = running.rid
        running.timings.queue_s = assignment.queued_s
        if not self._table.admit(running):
            log.debug("dropped a repeated or cancelled request %s", running.engine_id)
            if self._table.get(running.key) is None:
                # The router that placed it may not have heard of its end yet, and keeps room for it.
                self._event(running, bus_pb2.PHASE_ABORTED)
            return None
        running.stay = self._traces.admitted(submit.traceparent)
        return running

    def _taken(self, running: Running, *, others_wait: bool) -> None:
        self._outbox.hurry(others_wait)
        self._outbox.placed(running.frontend, running.rid, running.leg)
        self._event(running, bus_pb2.PHASE_ACCEPTED)

    def _new_engine_id(self, key: RequestKey) -> str:
        self._runs += 1
        return f"{key.id}.{key.attempt}.{key.choice}.{self._runs}"

    def _request(
        self,
        running: Running,
        prompt: Sequence[int],
        sampling: SamplingParams,
        handoff: KvHandoff | None,
        handoff_valid_s: float | None,
    ) -> EngineRequest:
        submit = running.submit
        produces = running.produces is not None
        return EngineRequest(
            request_id=running.engine_id,
            prompt=prompt,
            sampling=sampling,
            priority=running.priority,
            cache_salt=submit.cache_salt,
            lora=submit.lora,
            produce_handoff=produces,
            handoff=handoff,
            handoff_valid_s=handoff_valid_s,
            traceparent=self._traces.below(running.stay, handed_over=produces),
            embed=running.embed,
        )

    def _submit(
        self,
        running: Running,
        prompt: Sequence[int],
        sampling: SamplingParams,
        handoff: KvHandoff | None = None,
        handoff_valid_s: float | None = None,
    ) -> None:
        try:
            request = self._request(running, prompt, sampling, handoff, handoff_valid_s)
            self._engine.submit(request, partial(self._hear, running, running.engine_id))
        except Exception as error:  # one request's defect must not take those that came with it
            log.exception("%s could not be given to the engine", running.engine_id)
            self._give_up(running, error_finish(running.rid, InternalError(repr(error))))

    def _give(self, running: Running, handoff: KvHandoff | None = None, valid_s: float | None = None) -> None:
        self._submit(running, token_ids(running.submit.prompt), _sampling(running.submit.sampling), handoff, valid_s)

    def _hear(self, running: Running, engine_id: str, output: EngineOutput) -> None:
        """News of the engine: dealt with when it has said all that it says in this turn."""
        self._news.append((running, engine_id, output))
        self._outbox.soon()

    def work_off(self) -> None:
        """Deals with the engine's news so far. A defect in here ends the process, as that of the engine does: news are
        lost, and the requests are better run elsewhere."""
        while self._news:
            try:
                self._work_off()
            except Exception as error:
                self._spawn(_fail(error))

    def _work_off(self) -> None:
        news, self._news = self._news, []
        now = self._now()
        ended: list[tuple[Running, EngineOutput]] = []
        handed_over: list[tuple[Running, KvHandoff]] = []
        over: set[str] = set()
        for running, engine_id, output in news:
            if running.finish is not None or running.engine_id != engine_id or engine_id in over:
                continue  # a run that has ended, or was given up for another one, has nothing more to say
            if isinstance(output.error, HandoffFailed) and self._pulls.news(running):
                continue  # without a token: what becomes of it is the pull's to say
            if running.produces is not None:
                if output.cached_tokens is not None:
                    running.cached_tokens = output.cached_tokens
            elif running.tokens and output.token_ids and output.logprobs is None:
                self._tokens(running, output.token_ids, now)  # as after most steps
            else:
                self._output(running, output, now)
            if output.handoff is not None:
                handed_over.append((running, output.handoff))
                over.add(engine_id)
            elif output.finish is not None:
                ended.append((running, output))
                over.add(engine_id)
        if ended:
            self._finish(ended, now)
        for running, handoff in handed_over:
            self._hand_over(running, handoff, now)

    def _tokens(self, running: Running, token_ids: Sequence[int], now: float) -> None:
        tokens = running.tokens
        self._outbox.tokens(running.frontend, running.rid, len(tokens), token_ids)
        tokens.extend(token_ids)
        running.token_times.append(now)

    def _output(self, running: Running, output: EngineOutput, now: float) -> None:
        """Its first token, what comes with that only, and what is rare."""
        if output.cached_tokens is not None:
            running.cached_tokens = output.cached_tokens
        if output.transferred_bytes:
            running.timings.kv_transfer_bytes = output.transferred_bytes
        if output.transfer_s:
            running.timings.kv_transfer_s = output.transfer_s
        if output.transfer_ended_s and running.stay is not None:
            running.stay.pulled_s = output.transfer_ended_s
        if output.logprobs is not None or output.prompt_logprobs is not None:
            self._outbox.logprobs(running.frontend, logprobs_update(running, output))
        if output.token_ids:
            first = not running.tokens
            self._tokens(running, output.token_ids, now)
            if first:
                self._first_token(running, ended=output.finish is not None)

    def _first_token(self, running: Running, *, ended: bool) -> None:
        if running.pulls:
            self._pulls.news(running)
        if not ended:  # that says it, too
            self._event(running, bus_pb2.PHASE_DECODING)
        if running.leg == bus_pb2.LEG_LOCAL:
            self.on_cached(running.predicted_cached_tokens, running.cached_tokens)

    def _finish(self, ended: Sequence[tuple[Running, EngineOutput]], now: float) -> None:
        for running, output in ended:
            assert output.finish is not None
            answer = running.answer
            answer.reason = codec.finish_to_wire(output.finish)
            answer.output_tokens = len(running.tokens)
            answer.cached_tokens = running.cached_tokens
            if output.stop_token_id is not None:
                answer.stop_token_id = output.stop_token_id
            if output.embedding:
                answer.embedding = output.embedding
            if output.error is not None:
                answer.error.CopyFrom(codec.error_to_wire(output.error))
        self._end([running for running, _ in ended], now)

    def _give_up(self, running: Running, finish: bus_pb2.Finish) -> None:
        """It ends with ``finish``, whatever the engine does."""
        running.answer.MergeFrom(finish)
        self._end([running], self._now())

    def _end(self, ended: Sequence[Running], now: float) -> None:
        """Each of them has its answer, but for the timings."""
        for running in ended:
            add_timings(running, self._worker)
        for running in ended:
            self._table.finished(running, running.answer, now)
        for running in ended:
            self._traces.ended(running)
        for running in ended:
            self._outbox.finish(running.frontend, running.answer)
            self._event(running, end_phase(running))
        for running in ended:
            self.on_end(running)
        for running in ended:
            if running.pulls:
                self._pulls.news(running)

    # -- the prefill leg -------------------------------------------------------------------------------------------

    def _hand_over(self, running: Running, handoff: KvHandoff, now: float) -> None:
        assignment = running.produces
        assert assignment is not None
        if self._table.is_fenced(running.key):  # aborted in this very turn
            self._engine.release_handoff(handoff.handoff_id, pulled=False)
            return self._give_up(running, abort_finish(running.rid))
        timings = running.timings
        timings.prefill_s = now - running.accepted_at
        timings.cached_tokens = running.cached_tokens
        timings.computed_tokens = running.isl_tokens - running.cached_tokens
        timings.prefill_worker = self._worker
        timings.decode_worker = assignment.decode.id
        # For this worker the request ends here; the frontend hears the rest from the decode worker.
        running.handed_over = True
        self._table.finished(running, bus_pb2.Finish(rid=running.rid), now)
        self._traces.ended(running)
        self._event(running, bus_pb2.PHASE_PREFILL_DONE)
        self.on_end(running)
        self.on_cached(running.predicted_cached_tokens, running.cached_tokens)
        message = bus_pb2.Handoff(
            assignment=assignment,
            prefill=self._outbox.ref,
            kv=bus_pb2.KvHandoff(
                handoff_id=handoff.handoff_id,
                engine_id=handoff.engine_id,
                num_tokens=handoff.num_tokens,
                params=handoff.params,
            ),
            timings=timings,
        )
        entry = OpenHandoff(running.key, message, now)
        self._handoffs.opened(entry)
        self._send_handoff(handoff.handoff_id, entry)

    def _send_handoff(self, handoff_id: str, entry: OpenHandoff) -> None:
        message = bus_pb2.WorkerMessage(handoff=entry.message)
        self._send(entry.decode.id, message, about="h:" + handoff_id)

    def _handoff_undeliverable(self, entry: OpenHandoff) -> None:
        running = self._table.get(entry.key)
        if running is not None:
            error = HandoffFailed(f"decode worker {entry.decode.id} is gone")
            self.on_kv_failure("undeliverable")
            self._outbox.finish(running.frontend, error_finish(running.rid, error))
            self._event(running, bus_pb2.PHASE_FAILED, error_code=error.code)

    # -- the decode side of a handoff ------------------------------------------------------------------------------

    def _decode_from(self, running: Running, kv: KvHandoff, valid_s: float) -> None:
        if running.stay is not None:
            running.stay.claimed_s = self._now()
        self._give(running, kv, valid_s)

    def _prefill_here(self, running: Running, why: str) -> None:
        given_up = running.engine_id
        self._engine.abort(given_up)
        if self._table.is_fenced(running.key):
            return self._give_up(running, abort_finish(running.rid))
        log.warning("%s: %s; prefilling here (trace %s)", given_up, why, trace_of(running.submit.traceparent))
        self._traces.fell_back(running, why)
        running.engine_id = self._new_engine_id(running.key)
        running.leg = bus_pb2.LEG_LOCAL
        running.predicted_cached_tokens = 0  # that was of the prefill worker
        return self._give(running)

    # -- saying it -------------------------------------------------------------------------------------------------

    def _send(self, worker: str, message: bus_pb2.WorkerMessage, *, about: str) -> None:
        try:
            self._bus.publish(
                subjects.work(self._cluster, worker),
                message.SerializeToString(),
                subjects.bounce(self._cluster, self._worker, about),
            )
        except (BusUnavailable, PayloadTooLarge) as error:
            log.warning("message to %s not sent: %s", worker, error)
            self.bounced(about)

    def _refuse(self, submit: bus_pb2.Submit, error: TandemError) -> None:
        self.on_refusal(error.code)
        self._outbox.reject(submit.frontend, submit.rid, codec.error_to_wire(error))
        self._outbox.event(codec.key_from_wire(submit.key), bus_pb2.PHASE_FAILED, error_code=error.code)

    def _event(self, running: Running, phase: bus_pb2.Phase, *, error_code: str = "") -> None:
        finish = running.finish
        if not error_code and finish is not None and finish.HasField("error"):
            error_code = finish.error.code
        self._outbox.event(
            running.key,
            phase,
            output_tokens=len(running.tokens),
            cached_tokens=running.cached_tokens,
            error_code=error_code,
        )


def _read(message: bus_pb2.Assignment) -> Assigned:
    submit = bus_pb2.Submit.FromString(message.submit)
    return Assigned(message, submit, token_ids(submit.prompt), _sampling(submit.sampling))


async def _fail(error: Exception) -> None:
    raise error


def _sampling(wire: types_pb2.SamplingParams) -> SamplingParams:
    """Most requests have one of a few: a look-up, instead of some twenty fields read one by one."""
    data = wire.SerializeToString()
    return _known_sampling(data) if len(data) <= _SHORT_SAMPLING else codec.sampling_from_wire(wire)


@lru_cache(maxsize=256)
def _known_sampling(data: bytes) -> SamplingParams:
    return codec.sampling_from_wire(types_pb2.SamplingParams.FromString(data))


def _phase(running: Running) -> bus_pb2.Phase:
    return bus_pb2.PHASE_DECODING if running.tokens else bus_pb2.PHASE_ACCEPTED
