"""One router and one worker as the frontend sees them: they speak the wire on a Bus, and compute nothing.

What a request is answered with is up to ``script``: from the Submit to the token ids of its answer. Each step sends a
token per running request in one columnar frame. Knobs break things on purpose.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from tandem.adapters.bus import Bus, Message, Subscription
from tandem.core.blocks import token_bytes, token_ids
from tandem.core.types import FinishReason, RequestKey
from tandem.errors import TandemError, UnknownRequest
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec, subjects

Script = Callable[[bus_pb2.Submit], Sequence[int]]


class FakeCluster:
    def __init__(self, bus: Bus, cluster: str, model: str, script: Script, *, step_s: float = 0.002) -> None:
        self.script = script
        self.step_s = step_s
        self.submits: list[bus_pb2.Submit] = []
        self.aborts: list[bus_pb2.Abort] = []
        self.running: dict[RequestKey, bus_pb2.Submit] = {}
        #: What the router answers instead of placing.
        self.refusal: TandemError | None = None
        #: Requests stay in the router's queue.
        self.holding = False
        self.announcing = True
        #: Whether token frames arrive at all.
        self.lossy: Callable[[bus_pb2.TokenFrame], bool] = lambda frame: False
        #: Log-probabilities of one token, where asked for: the sampled one first.
        self.logprobs: Callable[[int], list[tuple[int, float, int]]] = lambda token: [(token, -0.5, 1)]
        self._bus = bus
        self._cluster = cluster
        self._model = model
        self._router, self._epoch = "router", 1
        self._ref = types_pb2.WorkerRef(id="worker", incarnation=1)
        self._answers: dict[RequestKey, list[int]] = {}
        self._sent: dict[RequestKey, int] = {}
        self.subscriptions: list[Subscription] = []
        self._finishes: dict[RequestKey, bus_pb2.Finish] = {}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeCluster]:
        subscribe = self._bus.subscribe
        self.subscriptions = [
            await subscribe(subjects.requests(self._cluster, self._model, self._router), self._on_submits),
            await subscribe(subjects.work(self._cluster, "worker"), self._on_work),
            await subscribe(subjects.aborts(self._cluster, self._model), self._on_abort),
        ]
        tasks = [asyncio.create_task(self._announce()), asyncio.create_task(self._steps())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            for subscription in self.subscriptions:
                await subscription.unsubscribe()

    async def return_as_leader(self) -> None:
        """Another router, with a higher epoch."""
        self._router, self._epoch = f"router-{self._epoch + 1}", self._epoch + 1
        subject = subjects.requests(self._cluster, self._model, self._router)
        self.subscriptions.append(await self._bus.subscribe(subject, self._on_submits))
        self.announcing = True

    def fail_running(self, error: TandemError) -> None:
        """Every running request ends with ``error``, as if its engine had failed."""
        for key in list(self.running):
            submit = self.running.pop(key)
            finish = bus_pb2.Finish(rid=submit.rid, reason=types_pb2.FINISH_REASON_ERROR)
            finish.error.CopyFrom(codec.error_to_wire(error))
            self._say(submit.frontend, bus_pb2.TokenFrame(worker=self._ref, finishes=[finish]))

    def embed_running(self, vector: bytes) -> None:
        """Every running request ends with ``vector``."""
        for key in list(self.running):
            submit = self.running.pop(key)
            finish = bus_pb2.Finish(rid=submit.rid, reason=types_pb2.FINISH_REASON_STOP, embedding=vector)
            self._say(submit.frontend, bus_pb2.TokenFrame(worker=self._ref, finishes=[finish]))

    # -- the router ------------------------------------------------------------------------------------------------

    async def _announce(self) -> None:
        while True:
            if self.announcing:
                message = bus_pb2.LeaderAnnouncement(model=self._model, router=self._router, epoch=self._epoch)
                self._bus.publish(subjects.leader(self._cluster, self._model), message.SerializeToString())
            await asyncio.sleep(0.1)

    def _on_submits(self, message: Message) -> None:
        for data in bus_pb2.Submits.FromString(message.data).submits:
            self._on_submit(bus_pb2.Submit.FromString(data))

    def _on_submit(self, submit: bus_pb2.Submit) -> None:
        self.submits.append(submit)
        if self.holding:
            return
        if self.refusal is not None:
            reject = bus_pb2.Reject(rid=submit.rid, error=codec.error_to_wire(self.refusal))
            frame = bus_pb2.TokenFrame(worker=types_pb2.WorkerRef(id=self._router), rejects=[reject])
            self._bus.publish(subjects.tokens(self._cluster, submit.frontend), frame.SerializeToString())
            return
        key = codec.key_from_wire(submit.key)
        self.running[key] = submit
        self._answers[key] = list(self.script(submit))[: submit.sampling.max_tokens]
        self._sent[key] = 0
        placed = bus_pb2.Placed(rid=submit.rid, leg=bus_pb2.LEG_LOCAL)
        self._say(submit.frontend, bus_pb2.TokenFrame(worker=self._ref, placed=[placed]))

    def _on_abort(self, message: Message) -> None:
        abort = bus_pb2.Abort.FromString(message.data)
        self.aborts.append(abort)
        for key in list(self.running):
            if key.id == abort.id and key.attempt <= abort.max_attempt and key.choice == abort.choice:
                submit = self.running.pop(key)
                self._finish(key, submit, FinishReason.ABORT)

    # -- the worker ------------------------------------------------------------------------------------------------

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            self._step()

    def _step(self) -> None:
        frames: dict[str, bus_pb2.TokenFrame] = {}
        for key in list(self.running):
            submit = self.running[key]
            frame = frames.setdefault(submit.frontend, bus_pb2.TokenFrame(worker=self._ref))
            self._tokens(frame, key, submit.rid, self._sent[key], self._sent[key] + 1)
            self._sent[key] += 1
            if self._sent[key] == len(self._answers[key]):
                del self.running[key]
                short = len(self._answers[key]) < submit.sampling.max_tokens
                reason = FinishReason.STOP if short else FinishReason.LENGTH
                frame.finishes.append(self._finish_of(key, submit, reason))
        for frontend, frame in frames.items():
            self._say(frontend, frame)

    def _tokens(self, frame: bus_pb2.TokenFrame, key: RequestKey, rid: int, start: int, end: int) -> None:
        new = self._answers[key][start:end]
        frame.rids.append(rid)
        frame.seqs.append(start)
        frame.counts.append(len(new))
        frame.tokens += token_bytes(new)
        submit = self.running.get(key)
        if submit is not None and submit.sampling.HasField("logprobs"):
            positions = [
                types_pb2.PositionLogprobs(
                    tokens=[types_pb2.TokenLogprob(token_id=t, logprob=p, rank=r) for t, p, r in self.logprobs(token)]
                )
                for token in new
            ]
            update = bus_pb2.LogprobsUpdate(rid=rid, seq=start, positions=positions)
            if start == 0 and submit.sampling.HasField("prompt_logprobs"):
                update.prompt_positions.add()  # nothing comes before the first token
                for token in token_ids(submit.prompt)[1:]:
                    update.prompt_positions.add().tokens.add(token_id=token, logprob=-0.25, rank=1)
            frame.logprobs.append(update)

    def _finish_of(self, key: RequestKey, submit: bus_pb2.Submit, reason: FinishReason) -> bus_pb2.Finish:
        finish = bus_pb2.Finish(
            rid=submit.rid,
            reason=codec.finish_to_wire(reason),
            output_tokens=self._sent[key],
            cached_tokens=min(4, submit.isl_tokens),
        )
        self._finishes[key] = finish
        return finish

    def _finish(self, key: RequestKey, submit: bus_pb2.Submit, reason: FinishReason) -> None:
        finish = self._finish_of(key, submit, reason)
        self._say(submit.frontend, bus_pb2.TokenFrame(worker=self._ref, finishes=[finish]))

    def _on_work(self, message: Message) -> None:
        repair = bus_pb2.WorkerMessage.FromString(message.data).repair
        key = codec.key_from_wire(repair.key)
        frame = bus_pb2.TokenFrame(worker=self._ref)
        if key not in self._answers:
            finish = bus_pb2.Finish(rid=repair.rid, reason=types_pb2.FINISH_REASON_ERROR)
            finish.error.CopyFrom(codec.error_to_wire(UnknownRequest("not here")))
            frame.finishes.append(finish)
        else:
            frame.placed.append(bus_pb2.Placed(rid=repair.rid, leg=bus_pb2.LEG_LOCAL))
            self._tokens(frame, key, repair.rid, repair.from_seq, self._sent[key])
            if key in self._finishes:
                frame.finishes.append(self._finishes[key])
        self._say(repair.frontend, frame)

    def _say(self, frontend: str, frame: bus_pb2.TokenFrame) -> None:
        if not self.lossy(frame):
            self._bus.publish(subjects.tokens(self._cluster, frontend), frame.SerializeToString())
