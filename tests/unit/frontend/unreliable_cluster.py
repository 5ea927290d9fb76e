"""A cluster in virtual time around a RequestTable: a router, workers, and a bus that loses, repeats and delays.

The "model" is a function of everything before a token, so that a request that is continued elsewhere must go on with
the very same tokens.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from itertools import count

from services.frontend.effects import Abandon, AskAgain, Deliver, Ended, Opened, Restarted, Submit
from services.frontend.journey import Journey
from services.frontend.leaders import Leaders
from services.frontend.line import Line
from services.frontend.order import Consumer, Order, Outcome, Patience, Positions
from services.frontend.request_table import RequestTable
from services.frontend.submission import submit_message
from tandem.core.blocks import token_bytes, token_ids
from tandem.core.types import FinishReason, RequestKey, SamplingParams
from tandem.errors import UnknownRequest, WorkerLostError
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec

MODEL = "m"
END_TOKEN = 7


def next_token(before: Sequence[int]) -> int:
    return (sum(before) * 31 + len(before) * 17) % 997


def reference(prompt: Sequence[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
        if tokens[-1] == END_TOKEN:
            break
    return tokens[len(prompt) :]


class _RecordedLine(Line):
    """Takes what is even."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.taken = 0

    def take(self, tokens: Sequence[int]) -> bool:
        if any(token % 2 for token in tokens):
            return False
        self._recorder.tokens(tokens, None, None)
        self.taken += len(tokens)
        return True


class Recorder(Consumer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.outcome: Outcome | None = None
        self.opened_times = 0
        self.restarts = 0
        self.line = _RecordedLine(self)

    def opened(self) -> None:
        assert self.outcome is None
        self.opened_times += 1

    def tokens(self, tokens: Sequence[int], positions: Positions | None, prompt_positions: Positions | None) -> None:
        assert self.outcome is None and self.opened_times == 1
        self.seen += tokens

    def restarted(self) -> None:
        assert self.outcome is None
        self.restarts += 1
        self.seen = []

    def ended(self, outcome: Outcome) -> None:
        assert self.outcome is None
        self.outcome = outcome


class Worker:
    def __init__(self, name: str, incarnation: int) -> None:
        self.ref = types_pb2.WorkerRef(id=name, incarnation=incarnation)
        self.alive = True
        self.running: dict[RequestKey, bus_pb2.Submit] = {}
        self.tokens: dict[RequestKey, list[int]] = {}
        self.finish: dict[RequestKey, bus_pb2.Finish] = {}

    def take(self, submit: bus_pb2.Submit) -> bus_pb2.TokenFrame | None:
        key = codec.key_from_wire(submit.key)
        if key in self.tokens:
            return None
        self.running[key] = submit
        self.tokens[key] = []
        return bus_pb2.TokenFrame(worker=self.ref, placed=[bus_pb2.Placed(rid=submit.rid, leg=bus_pb2.LEG_LOCAL)])

    def step(self, key: RequestKey, most: int) -> bus_pb2.TokenFrame:
        submit, tokens = self.running[key], self.tokens[key]
        first = len(tokens)
        finish = None
        while len(tokens) - first < most and finish is None:
            tokens.append(next_token([*token_ids(submit.prompt), *tokens]))
            if tokens[-1] == END_TOKEN:
                finish = FinishReason.STOP
            elif len(tokens) == submit.sampling.max_tokens:
                finish = FinishReason.LENGTH
        frame = self.frame(key, submit.rid, first)
        if finish is not None:
            self.finish[key] = bus_pb2.Finish(
                rid=submit.rid, reason=codec.finish_to_wire(finish), output_tokens=len(tokens), cached_tokens=3
            )
            frame.finishes.append(self.finish[key])
            del self.running[key]
        return frame

    def frame(self, key: RequestKey, rid: int, from_seq: int) -> bus_pb2.TokenFrame:
        new = self.tokens[key][from_seq:]
        return bus_pb2.TokenFrame(
            worker=self.ref, rids=[rid], seqs=[from_seq], counts=[len(new)], tokens=token_bytes(new)
        )

    def repair(self, repair: bus_pb2.Repair) -> bus_pb2.TokenFrame:
        key = codec.key_from_wire(repair.key)
        if key not in self.tokens:
            finish = bus_pb2.Finish(rid=repair.rid, reason=types_pb2.FINISH_REASON_ERROR)
            finish.error.CopyFrom(codec.error_to_wire(UnknownRequest("?")))
            return bus_pb2.TokenFrame(worker=self.ref, finishes=[finish])
        frame = self.frame(key, repair.rid, repair.from_seq)
        frame.placed.append(bus_pb2.Placed(rid=repair.rid, leg=bus_pb2.LEG_LOCAL))
        if key in self.finish:
            frame.finishes.append(self.finish[key])
        return frame


class UnreliableCluster:
    """``trouble``: probability of each kind of mishap; it ends at ``peace_s``."""

    def __init__(self, seed: int, *, trouble: float, peace_s: float = 20.0, patience: Patience | None = None) -> None:
        self.rng = random.Random(seed)
        self.trouble = trouble
        self.peace_s = peace_s
        self.now = 1000.0
        self._start = self.now
        self.table = RequestTable(Leaders(), patience or Patience())
        self.router, self.epoch = "router-1", 1
        self.router_alive = True
        self.workers = [Worker(f"w{i}", 1) for i in range(3)]
        self.recorders: dict[Journey, Recorder] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._every(0.25, self._announce)
        self._every(0.1, lambda: self.table.on_tick(self.now))
        self._every(0.7, self._mishap)

    def begin(self, prompt: Sequence[int], sampling: SamplingParams, **more: object) -> Recorder:
        order = Order(
            id=f"r{len(self.recorders)}",
            model=MODEL,
            prompt=token_bytes(prompt),
            sampling=sampling,
            arrival_s=self.now,
            deadline_s=self.now + 600.0,
            end_tokens=frozenset([END_TOKEN]),
            **more,  # type: ignore[arg-type]
        )
        recorder = Recorder()
        self.recorders[self.table.begin(order, recorder, self.now)] = recorder
        self._perform()
        return recorder

    def run(self, *, until: Callable[[], bool], at_most_s: float) -> None:
        end = self.now + at_most_s
        while not until() and self.now < end:
            self.now, _, action = heapq.heappop(self._due)
            action()
            self._perform()

    # -- the bus ---------------------------------------------------------------------------------------------------

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + delay_s, next(self._order), action))

    def _every(self, period_s: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self.later(period_s, again)

        self.later(period_s, again)

    def _bad_luck(self) -> bool:
        return self.now - self._start < self.peace_s and self.rng.random() < self.trouble

    def _carry(self, action: Callable[[], None]) -> None:
        """Once, never or twice, after a while."""
        copies = 1
        if self._bad_luck():
            copies = self.rng.choice([0, 0, 2])
        for _ in range(copies):
            self.later(self.rng.choice([0.001, 0.002, 0.3]) if self._bad_luck() else 0.001, action)

    def _to_frontend(self, frame: bus_pb2.TokenFrame) -> None:
        data = frame.SerializeToString()
        self._carry(lambda: self.table.on_frame(bus_pb2.TokenFrame.FromString(data), self.now))

    # -- what the table wants --------------------------------------------------------------------------------------

    def _perform(self) -> None:
        told: list[Journey] = []
        while effects := self.table.take_effects():
            for effect in effects:
                consumer = effect.journey.consumer
                match effect:
                    case Submit():
                        self._submitted(effect.journey)
                    case Deliver():
                        consumer.tokens(effect.tokens, effect.positions, effect.prompt_positions)
                        told.append(effect.journey)
                    case Opened():
                        consumer.opened()
                    case Restarted():
                        consumer.restarted()
                    case Ended():
                        consumer.ended(effect.outcome)
                    case Abandon():
                        self._carry(lambda e=effect: self._aborted(e.journey.order.id, e.max_attempt))
                    case AskAgain():
                        self._asked(effect)
        for journey in told:  # as a stream does when nothing waits any more
            journey.open_line(self.recorders[journey].line)

    def _submitted(self, journey: Journey) -> None:
        data = submit_message(journey, frontend="f", now=self.now)
        router = journey.leader.router if journey.leader else ""

        def arrive() -> None:
            if not self.router_alive or router != self.router:
                self.table.on_router_bounced(router, self.now)
                return
            submit = bus_pb2.Submit.FromString(data)
            able = [w for w in self.workers if w.alive and w.ref.id not in submit.avoid_workers] or [
                w for w in self.workers if w.alive
            ]
            if able:
                worker = self.rng.choice(able)
                self.later(0.001, lambda: self._assigned(worker, submit))
            else:
                self._reject(submit.rid)

        self._carry(arrive)

    def _reject(self, rid: int) -> None:
        reject = bus_pb2.Reject(rid=rid, error=codec.error_to_wire(WorkerLostError("none left")))
        self._to_frontend(bus_pb2.TokenFrame(worker=types_pb2.WorkerRef(id=self.router), rejects=[reject]))

    def _assigned(self, worker: Worker, submit: bus_pb2.Submit) -> None:
        if not worker.alive:
            self._reject(submit.rid)
            return
        placed = worker.take(submit)
        if placed is not None:
            self._to_frontend(placed)
            self.later(0.05, lambda: self._step(worker, codec.key_from_wire(submit.key)))

    def _step(self, worker: Worker, key: RequestKey) -> None:
        if worker.alive and key in worker.running:
            self._to_frontend(worker.step(key, self.rng.randint(1, 3)))
            self.later(0.05, lambda: self._step(worker, key))

    def _asked(self, question: AskAgain) -> None:
        journey = question.journey
        repair = bus_pb2.Repair(key=codec.key_to_wire(journey.key), rid=journey.rid, from_seq=question.from_seq)

        def arrive() -> None:
            worker = next((w for w in self.workers if w.alive and w.ref.id == question.worker.id), None)
            if worker is None:
                self.table.on_worker_bounced(question.worker.id, self.now)
            else:
                self._to_frontend(worker.repair(repair))

        self._carry(arrive)

    def _aborted(self, request_id: str, max_attempt: int) -> None:
        for worker in self.workers:
            for key in [k for k in worker.running if k.id == request_id and k.attempt <= max_attempt]:
                submit = worker.running.pop(key)
                finish = bus_pb2.Finish(rid=submit.rid, reason=types_pb2.FINISH_REASON_ABORT, cached_tokens=3)
                self._to_frontend(bus_pb2.TokenFrame(worker=worker.ref, finishes=[finish]))

    # -- what goes wrong -------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        if self.router_alive:
            router, epoch = self.router, self.epoch
            announcement = bus_pb2.LeaderAnnouncement(model=MODEL, router=router, epoch=epoch)
            self._carry(lambda: self.table.on_announcement(announcement, self.now))

    def _mishap(self) -> None:
        if self._bad_luck():
            self._kill(self.rng.choice(self.workers))
        if self._bad_luck():
            self.router_alive = False
            self.later(1.0, self._elect)

    def _elect(self) -> None:
        self.router_alive = True
        self.epoch += 1
        self.router = f"router-{self.epoch}"

    def _kill(self, worker: Worker) -> None:
        if not worker.alive:
            return
        worker.alive = False
        lost = bus_pb2.WorkerLost(model=MODEL, worker=worker.ref.id, incarnation=worker.ref.incarnation)
        self.later(0.5, lambda: self._carry(lambda: self.table.on_worker_lost(lost, self.now)))
        self.later(1.0, lambda: self._restart(worker))

    def _restart(self, worker: Worker) -> None:
        self.workers[self.workers.index(worker)] = Worker(worker.ref.id, worker.ref.incarnation + 1)
