"""Runs what a worker is given: from an assignment or a handoff to the last token.

One flow for both roles; what differs is which leg the router sends. Prefill leg: compute the prompt, hand the KV to
the decode worker named in the assignment. Local leg: do it all. Handoff: claim, pull, decode; when the pull cannot be
trusted or does not come, prefill here instead. Whatever fails reaches the frontend as a Finish with a typed error,
and the frontend, who owns the request, submits again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tandem.adapters.bus import Bus
from tandem.core.blocks import token_ids
from tandem.core.types import FinishReason, RequestKey
from tandem.engine.protocol import Engine, EngineOutput, EngineRequest, KvHandoff, Logprob
from tandem.errors import (
    BusUnavailable,
    HandoffFailed,
    PayloadTooLarge,
    Refused,
    StaleEpoch,
    TandemError,
    UnknownRequest,
)
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects
from tandem.worker.handoffs import OpenHandoff, OpenHandoffs, Peers
from tandem.worker.outbox import Outbox
from tandem.worker.request_table import RequestTable, Running

log = logging.getLogger(__name__)

#: A pull that starts in the last third of its lease might outlive it.
LEASE_RESERVE = 3
#: After the hop timeout the producer is asked again this often; a live producer and a busy engine get more time.
MAX_PULL_ROUNDS = 5

Spawn = Callable[[Coroutine[Any, Any, None]], object]


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
        self._spawn = spawn
        self._now = now
        self._hop_timeout_s = hop_timeout_s
        self._lease_s = lease_s
        self._pulls: dict[RequestKey, asyncio.Event] = {}
        self._runs = 0
        self.epoch = 0
        self.draining = False
        self.on_over_report: Callable[[], None] = lambda: None

    # -- what arrives ----------------------------------------------------------------------------------------------

    def assignment(self, message: bus_pb2.Assignment) -> None:
        submit = bus_pb2.Submit.FromString(message.submit)
        if message.epoch < self.epoch:
            return self._refuse(submit, StaleEpoch(f"epoch {message.epoch} is over; {self.epoch} is known"))
        self.epoch = message.epoch
        if self.draining:
            return self._refuse(submit, Refused(f"worker {self._worker} is draining"))
        running = self._admit(submit, message, message.leg)
        if running is None:
            return None
        if message.leg == bus_pb2.LEG_PREFILL:
            running.peer = message.decode.id
            return self._submit(running, produce=message)
        return self._submit(running)

    def handoff(self, message: bus_pb2.Handoff) -> None:
        submit = bus_pb2.Submit.FromString(message.assignment.submit)
        kv = KvHandoff(message.kv.handoff_id, message.kv.engine_id, message.kv.num_tokens, message.kv.params)
        running = self._admit(submit, message.assignment, bus_pb2.LEG_PREFILL)
        if running is None:
            self._spawn(self._peers.release(message.prefill, kv, pulled=False))
            return
        running.peer = message.prefill.id
        running.timings.CopyFrom(message.timings)
        self._spawn(self._pull(running, message.prefill, kv))

    def repair(self, message: bus_pb2.Repair) -> None:
        """Tokens from ``from_seq`` on, and the finish if there was one. A request handed over is asked of its new holder.

        Always answered: ``placed`` alone tells a frontend that asks during a long prefill that the request is alive.
        """
        running = self._table.get(codec.key_from_wire(message.key))
        if running is None:
            error = UnknownRequest(f"worker {self._worker} does not know this request")
            self._outbox.finish(message.frontend, _error_finish(message.rid, error))
        elif running.leg == bus_pb2.LEG_PREFILL and running.finish is not None and running.timings.decode_worker:
            forward = bus_pb2.WorkerMessage(repair=message)
            self._send(running.peer, forward, about=f"r:{message.rid}:{message.frontend}")
        else:
            self._outbox.placed(message.frontend, message.rid, running.leg)
            if len(running.tokens) > message.from_seq:
                self._outbox.tokens(message.frontend, message.rid, message.from_seq, running.tokens[message.from_seq :])
            if running.finish is not None:
                self._outbox.finish(message.frontend, running.finish)

    def abort(self, request_id: str, max_attempt: int, choice: int | None = None) -> int:
        """Ends every attempt up to ``max_attempt``, also one that has yet to arrive, of one choice or (None) of all.

        Returns how many were running.
        """
        found = self._table.fence(request_id, max_attempt, choice, self._now())
        for running in found:
            self._engine.abort(running.engine_id)
        self._handoffs.cancel(request_id, max_attempt, choice)
        return len(found)

    def taint(self, message: bus_pb2.Taint) -> None:
        """KV pulled from that prefill worker cannot be trusted: its streams fail, and what they left in the cache goes."""
        for running in self._table.unfinished():
            if running.leg == bus_pb2.LEG_PREFILL and running.peer == message.prefill.id:
                error = HandoffFailed(f"KV from {message.prefill.id} was read after its lease")
                log.error("%s: %s", running.engine_id, error.message)
                self._engine.abort(running.engine_id)
                self._end(running, _error_finish(running.rid, error), self._now())
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
            self._outbox.finish(frontend, _error_finish(int(rid), error))

    # -- running ---------------------------------------------------------------------------------------------------

    def _admit(self, submit: bus_pb2.Submit, assignment: bus_pb2.Assignment, leg: bus_pb2.Leg) -> Running | None:
        self._runs += 1
        running = Running(
            key=codec.key_from_wire(submit.key),
            submit=submit,
            leg=leg,
            accepted_at=self._now(),
            engine_id=f"{submit.key.id}.{submit.key.attempt}.{submit.key.choice}.{self._runs}",
            predicted_cached_tokens=assignment.predicted_cached_tokens,
            priority=assignment.priority,
        )
        if not self._table.admit(running):
            log.info("dropped a repeated or cancelled request %s", running.engine_id)
            return None
        self._outbox.placed(submit.frontend, submit.rid, leg)
        self._event(running, bus_pb2.PHASE_ACCEPTED)
        return running

    def _submit(
        self, running: Running, *, produce: bus_pb2.Assignment | None = None, handoff: KvHandoff | None = None
    ) -> None:
        submit = running.submit
        engine_id = running.engine_id

        def sink(output: EngineOutput) -> None:
            # A run that was given up for another one has nothing more to say.
            if running.finish is None and running.engine_id == engine_id:
                if produce is not None:
                    self._prefill_output(running, produce, output)
                else:
                    self._output(running, output)

        self._engine.submit(
            EngineRequest(
                request_id=engine_id,
                prompt=token_ids(submit.prompt),
                sampling=codec.sampling_from_wire(submit.sampling),
                priority=running.priority,
                cache_salt=submit.cache_salt,
                lora=submit.lora,
                produce_handoff=produce is not None,
                handoff=handoff,
                traceparent=submit.traceparent,
            ),
            sink,
        )

    def _output(self, running: Running, output: EngineOutput) -> None:
        now = self._now()
        pull = self._pulls.get(running.key)
        if pull is not None and isinstance(output.error, HandoffFailed):
            pull.set()  # without a token: the pull's own flow goes on from here
            return
        if output.cached_tokens is not None:
            running.cached_tokens = output.cached_tokens
        if output.transferred_bytes:
            running.timings.kv_transfer_bytes = output.transferred_bytes
        if output.transfer_s:
            running.timings.kv_transfer_s = output.transfer_s
        if output.logprobs is not None or output.prompt_logprobs is not None:
            self._outbox.logprobs(running.frontend, _logprobs(running, output))
        if output.token_ids:
            if not running.tokens:
                self._first_token(running)
            self._outbox.tokens(running.frontend, running.rid, len(running.tokens), output.token_ids)
            running.tokens.extend(output.token_ids)
            running.token_times.append(now)
        if output.finish is not None:
            self._finish(running, output, now)

    def _first_token(self, running: Running) -> None:
        pulled = self._pulls.get(running.key)
        if pulled is not None:
            pulled.set()
        self._event(running, bus_pb2.PHASE_DECODING)
        missing = running.predicted_cached_tokens - running.cached_tokens
        if running.leg == bus_pb2.LEG_LOCAL and missing > 0:
            self.on_over_report()

    def _finish(self, running: Running, output: EngineOutput, now: float) -> None:
        assert output.finish is not None
        finish = bus_pb2.Finish(
            rid=running.rid,
            reason=codec.finish_to_wire(output.finish),
            stop_token_id=output.stop_token_id,
            output_tokens=len(running.tokens),
            cached_tokens=running.cached_tokens,
            timings=_timings(running, self._worker),
        )
        if output.error is not None:
            finish.error.CopyFrom(codec.error_to_wire(output.error))
        self._end(running, finish, now)
        # After the end, so that a pull that waits for it sees it.
        pulled = self._pulls.get(running.key)
        if pulled is not None:
            pulled.set()

    def _end(self, running: Running, finish: bus_pb2.Finish, now: float) -> None:
        self._table.finished(running, finish, now)
        self._outbox.finish(running.frontend, finish)
        phase = {
            types_pb2.FINISH_REASON_ABORT: bus_pb2.PHASE_ABORTED,
            types_pb2.FINISH_REASON_ERROR: bus_pb2.PHASE_FAILED,
        }.get(finish.reason, bus_pb2.PHASE_FINISHED)
        self._event(running, phase, error_code=finish.error.code)

    # -- the prefill leg -------------------------------------------------------------------------------------------

    def _prefill_output(self, running: Running, assignment: bus_pb2.Assignment, output: EngineOutput) -> None:
        if output.cached_tokens is not None:
            running.cached_tokens = output.cached_tokens
        if output.finish is None:
            return
        if output.handoff is None:
            return self._finish(running, output, self._now())
        now = self._now()
        running.timings.prefill_s = now - running.accepted_at
        running.timings.cached_tokens = running.cached_tokens
        running.timings.computed_tokens = running.submit.isl_tokens - running.cached_tokens
        running.timings.prefill_worker = self._worker
        running.timings.decode_worker = assignment.decode.id
        self._handoffs.opened(output.handoff, OpenHandoff(running.key, assignment.decode.id, now))
        # For this worker the request ends here; the frontend hears the rest from the decode worker.
        self._table.finished(running, bus_pb2.Finish(rid=running.rid), now)
        self._event(running, bus_pb2.PHASE_PREFILL_DONE)
        message = bus_pb2.WorkerMessage(
            handoff=bus_pb2.Handoff(
                assignment=assignment,
                prefill=self._outbox.ref,
                kv=bus_pb2.KvHandoff(
                    handoff_id=output.handoff.handoff_id,
                    engine_id=output.handoff.engine_id,
                    num_tokens=output.handoff.num_tokens,
                    params=output.handoff.params,
                ),
                timings=running.timings,
            )
        )
        self._send(assignment.decode.id, message, about="h:" + output.handoff.handoff_id)

    def _handoff_undeliverable(self, entry: OpenHandoff) -> None:
        running = self._table.get(entry.key)
        if running is not None:
            error = HandoffFailed(f"decode worker {entry.decode_worker} is gone")
            self._outbox.finish(running.frontend, _error_finish(running.rid, error))
            self._event(running, bus_pb2.PHASE_FAILED, error_code=error.code)

    # -- the decode side of a handoff ------------------------------------------------------------------------------

    async def _pull(self, running: Running, peer: types_pb2.WorkerRef, kv: KvHandoff) -> None:
        started = self._now()
        left = await self._peers.claim(peer, kv, self._worker)
        if self._table.is_fenced(running.key):
            await self._peers.release(peer, kv, pulled=False)
            return self._end(running, _abort_finish(running.rid), self._now())
        if left < self._lease_s / LEASE_RESERVE:
            self._spawn(self._peers.release(peer, kv, pulled=False))
            return self._prefill_here(running, f"claim not granted ({left:.1f} s of the lease left)")
        done = self._pulls[running.key] = asyncio.Event()
        pulled = False
        try:
            self._submit(running, handoff=kv)
            pulled = await self._first_news(running, peer, kv, done)
        finally:
            self._pulls.pop(running.key, None)
            self._spawn(self._peers.release(peer, kv, pulled=pulled))
        if pulled:
            running.timings.kv_transfer_s = running.timings.kv_transfer_s or self._now() - started
        elif running.finish is None:
            self._prefill_here(running, "the KV could not be pulled")

    async def _first_news(
        self, running: Running, peer: types_pb2.WorkerRef, kv: KvHandoff, done: asyncio.Event
    ) -> bool:
        """True when the pull has come (a first token). Half a hop timeout without: the producer must show that it lives."""
        half = self._hop_timeout_s / 2
        for _ in range(2 * MAX_PULL_ROUNDS):
            try:
                await asyncio.wait_for(done.wait(), half)
                return bool(running.tokens)
            except TimeoutError:
                if not await self._peers.claim(peer, kv, self._worker, timeout_s=half):
                    return bool(running.tokens)
        return bool(running.tokens)

    def _prefill_here(self, running: Running, why: str) -> None:
        log.warning("%s: %s; prefilling here", running.engine_id, why)
        given_up = running.engine_id
        self._runs += 1
        running.engine_id = f"{running.key.id}.{running.key.attempt}.{running.key.choice}.{self._runs}"
        running.leg = bus_pb2.LEG_LOCAL
        self._engine.abort(given_up)
        self._submit(running)

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
        self._outbox.reject(submit.frontend, submit.rid, codec.error_to_wire(error))
        event = bus_pb2.LifecycleEvent(key=submit.key, phase=bus_pb2.PHASE_FAILED, error_code=error.code)
        self._outbox.event(event)

    def _event(self, running: Running, phase: bus_pb2.Phase, *, error_code: str = "") -> None:
        self._outbox.event(
            bus_pb2.LifecycleEvent(
                key=running.submit.key,
                phase=phase,
                output_tokens=len(running.tokens),
                cached_tokens=running.cached_tokens,
                error_code=error_code,
            )
        )


def _error_finish(rid: int, error: TandemError) -> bus_pb2.Finish:
    return bus_pb2.Finish(rid=rid, reason=types_pb2.FINISH_REASON_ERROR, error=codec.error_to_wire(error))


def _abort_finish(rid: int) -> bus_pb2.Finish:
    return bus_pb2.Finish(rid=rid, reason=codec.finish_to_wire(FinishReason.ABORT))


def _timings(running: Running, worker: str) -> bus_pb2.Timings:
    """Durations of the decode worker's part, beside what the prefill worker told."""
    timings = running.timings
    times = running.token_times
    timings.decode_worker = worker
    if running.leg == bus_pb2.LEG_LOCAL:
        timings.cached_tokens = running.cached_tokens
        timings.computed_tokens = running.submit.isl_tokens - running.cached_tokens
    if times:
        if running.leg == bus_pb2.LEG_LOCAL:
            timings.prefill_s = times[0] - running.accepted_at
        timings.decode_s = times[-1] - times[0]
        gaps = sorted(b - a for a, b in itertools.pairwise(times))
        if gaps:
            timings.itl_p50_s = gaps[len(gaps) // 2]
            timings.itl_p99_s = gaps[int(len(gaps) * 0.99)]
    return timings


def _logprobs(running: Running, output: EngineOutput) -> bus_pb2.LogprobsUpdate:
    def position(candidates: Sequence[Logprob] | None) -> types_pb2.PositionLogprobs:
        tokens = [types_pb2.TokenLogprob(token_id=t, logprob=p, rank=r) for t, p, r in candidates or ()]
        return types_pb2.PositionLogprobs(tokens=tokens)

    return bus_pb2.LogprobsUpdate(
        rid=running.rid,
        seq=len(running.tokens),
        positions=[position(c) for c in output.logprobs or ()],
        prompt_positions=[position(c) for c in output.prompt_logprobs or ()],
    )
