"""The simulated engine in real time: the engine model on the event loop's clock, with a KV plane of its own.

Nothing is computed and no KV moves, but time passes as if, blocks are paged, cached and evicted, and the tokens are a
function of the tokens before them (enginemodel/content.py) and of what the KV blocks hold. So a worker, a router or a
frontend meets the behaviour of an engine, faults included, without a model.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf

from msgspec import Struct
from msgspec.structs import replace
from prometheus_client.registry import Collector

from tandem.core.types import FinishReason, StepTiming
from tandem.engine.kv_plane import KvServer, KvSource, read_blocks
from tandem.engine.protocol import (
    AllBlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineConfig,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    KvEvent,
    KvHandoff,
    Sink,
)
from tandem.engine.sim_config import SimArgs
from tandem.engine.sim_metrics import SimCounts
from tandem.enginemodel.block_pool import CacheEvent, Removed, Stored
from tandem.enginemodel.content import TokenContent, Vocabulary, hashed_embedding
from tandem.enginemodel.engine_model import EngineModel
from tandem.enginemodel.link import Link
from tandem.enginemodel.sequence import ModelConfig, Output, Pull, StepResult
from tandem.enginemodel.sequence import Sequence as ModelSequence
from tandem.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineFailed,
    HandoffFailed,
    InternalError,
    InvalidRequest,
    TandemError,
)
from tandem.telemetry.instruments import Instruments

_log = logging.getLogger(__name__)

#: A step that begins so soon after the last one ended begins, by its clock, where that ended: sleeps do not drift.
_BACK_TO_BACK_S = 0.02
#: Steps that take no time at all let the event loop do other things so often; what they say leaves in one message.
_BREATH_S = 0.002
_LONGEST_WAIT_S = 60.0
_KEPT_TIMINGS = 1000
#: Steps that take no time are done together where they are only decodes; so many at most, for the sake of the others.
_AT_ONCE = 32
#: Of a pull whose producer never said how long its blocks are good for.
_LONGEST_PULL_S = 600.0


class _Live(Struct, eq=False):
    """A request whose sink has not seen its end."""

    request: EngineRequest
    sink: Sink
    content: TokenContent
    source: KvSource | None = None
    source_ends: float = inf  # when the producer may have used those blocks for something else
    started: bool = False  # whether the sink has seen anything
    transferred_bytes: int | None = None
    transfer_s: float | None = None
    transfer_ended_s: float | None = None


class SimEngine:
    """Implements ``tandem.engine.protocol.Engine``."""

    def __init__(self, config: EngineConfig) -> None:
        """ConfigError if the options are wrong."""
        self._config = config
        self._args = SimArgs.parse(config.args)
        self._engine_id = uuid.uuid4().hex
        try:
            model_config = ModelConfig(
                num_blocks=self._args.num_blocks(config),
                block_size=config.block_size,
                max_num_seqs=self._args.max_num_seqs,
                max_batched_tokens=self._args.max_batched_tokens,
                # The model draws a token from every prompt; of an embedding nobody sees it.
                max_model_len=config.max_model_len + config.embeds,
                lease_s=config.kv_lease_s,
            )
        except ValueError as error:
            raise ConfigError(f"simulated engine: {error}", param="engine_args") from error
        self._model = EngineModel(model_config, self._args.timing())
        self._vocabulary = Vocabulary(())
        self._live: dict[str, _Live] = {}
        self._undelivered: list[tuple[Sink, EngineOutput]] = []
        #: By request, of steps that took no time: nothing of them could leave before the loop's turn ends.
        self._kept: dict[str, Output] = {}
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._notices: set[asyncio.Task[None]] = set()
        self._link = Link(self._args.link_bytes_per_s * (self._args.speedup or 1.0))
        self._kv_server = KvServer(self._engine_id, self._read_held, self._done_reading)
        self._reads_after_expiry = 0
        self._counts = SimCounts()
        self._timings: deque[StepTiming] = deque(maxlen=_KEPT_TIMINGS)
        self._steps = 0
        self._last_step_at = 0.0
        self._free = self._args.speedup == 0
        self._end = 0.0
        #: Calls the next step, or notices that the oldest lease ends.
        self._timer: asyncio.Handle | None = None
        self._waits = False
        self._woken = False
        self._dead = asyncio.Event()
        self._on_kv_events: Callable[[Sequence[KvEvent]], None] = lambda events: None
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- the port ------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        config, model = self._config, self._model.config
        return EngineInfo(
            engine="sim",
            engine_version="1",
            engine_id=self._engine_id,
            dtype=config.dtype,
            kv_layout="sim",
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            kv_blocks_total=model.num_blocks,
            kv_bytes_per_token=self._args.kv_bytes_per_token,
            max_batched_tokens=model.max_batched_tokens,
            max_num_seqs=model.max_num_seqs,
            perf_profile=self._args.profile,
            kv_endpoint=f"{config.kv_host}:{self._kv_server.port}" if config.disaggregated else "",
            link_bytes_per_s=self._args.link_bytes_per_s,
        )

    @property
    def dead(self) -> asyncio.Event:
        return self._dead

    async def start(self, on_kv_events: Callable[[Sequence[KvEvent]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_kv_events = on_kv_events
        self._vocabulary = await asyncio.to_thread(self._args.vocabulary, self._config.model_path)
        if self._config.disaggregated:
            try:
                await self._kv_server.start(self._config.kv_host, self._config.kv_port)
            except OSError as error:
                raise EngineFailed(f"KV endpoint {self._config.kv_host}:{self._config.kv_port}: {error}") from error
        self._last_step_at = self._now()
        self._next(self._loop.call_soon(self._turn))

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        try:
            live = self._accept(request, sink)
        except TandemError as error:
            self._undelivered.append((sink, EngineOutput(finish=FinishReason.ERROR, error=error)))
        else:
            self._live[request.request_id] = live
        self._wake()
        if self._dead.is_set():
            self._loop_().call_soon(self._deliver_rest)

    def abort(self, request_id: str) -> None:
        if not self._model.abort(request_id):
            return
        live = self._live.pop(request_id)
        if (pull := self._pulls.pop(request_id, None)) is not None:
            pull.cancel()
            self._model.pull_done(request_id, None)
        self._counts.ended[FinishReason.ABORT] += 1
        self._undelivered.append((live.sink, EngineOutput(finish=FinishReason.ABORT)))
        self._wake()

    def claim_handoff(self, handoff_id: str, engine_id: str) -> float | None:
        return self._model.claim_handoff(handoff_id, self._now()) if engine_id == self._engine_id else None

    def release_handoff(self, handoff_id: str, *, pulled: bool) -> None:
        if self._model.release_handoff(handoff_id):
            self._wake()

    def stats(self) -> EngineStats:
        now, model = self._now(), self._model
        model.expire_handoffs(now)
        tokens, context = model.pending_prefill()
        waiting = len(model.waiting())
        return EngineStats(
            waiting_requests=waiting,
            # Whose last step is under way is none of the model's any more.
            running_requests=max(model.num_running, len(self._live) - waiting),
            pending_prefill_tokens=tokens,
            pending_prefill_context_tokens=context,
            kv_blocks_used=model.pool.num_used,
            kv_tokens=model.decode_kv_tokens,
            steps=self._steps,
            last_step_age_s=now - self._last_step_at,
            open_handoffs=len(model.handoffs),
            reads_after_expiry=self._reads_after_expiry,
            preemptions=model.preemptions,
        )

    def take_step_timings(self) -> list[StepTiming]:
        timings = list(self._timings)
        self._timings.clear()
        return timings

    def expose(self, instruments: Instruments) -> Sequence[Collector]:
        self._counts.expose(instruments, self._config.served_model, self._model.pool.num_blocks, self.stats)
        return ()

    async def reset_prefix_cache(self) -> None:
        self._model.clear_cache()
        self._publish(self._model.pool.take_events())

    async def stop(self) -> None:
        self._halt()
        tasks = [*self._pulls.values(), *self._notices]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._kv_server.stop()
        self._end_all(EngineOutput(finish=FinishReason.ABORT))

    # -- requests ------------------------------------------------------------------------------------------------

    def _accept(self, request: EngineRequest, sink: Sink) -> _Live:
        """Give it to the model; TandemError if it cannot run here."""
        if self._dead.is_set():
            raise EngineFailed("the engine has stopped")
        if request.request_id in self._live:
            raise InternalError(f"request {request.request_id} is here already")
        if request.embed != self._config.embeds:
            raise InvalidRequest("this engine makes embeddings" if self._config.embeds else "this engine makes tokens")
        if request.sampling.structured_output is not None:
            raise InvalidRequest("the simulated engine has no structured output", param="response_format")
        source = self._source(request) if request.handoff is not None else None
        content = TokenContent(
            request.prompt,
            request.sampling,
            self._vocabulary,
            self._config.block_size,
            request.lora,
            request.cache_salt,
        )
        sequence = ModelSequence(
            request.request_id,
            content,
            1 if request.embed else request.sampling.max_tokens,
            request.priority,
            produce_handoff=request.produce_handoff,
            remote=source is not None,
        )
        try:
            self._model.submit(sequence)
        except ValueError as error:
            raise ContextLengthExceeded(str(error), param="messages") from error
        valid_s = request.handoff_valid_s
        return _Live(request, sink, content, source, inf if valid_s is None else self._now() + valid_s)

    def _source(self, request: EngineRequest) -> KvSource:
        handoff = request.handoff
        assert handoff is not None
        if not self._config.disaggregated:
            raise HandoffFailed("this engine takes no KV handoffs")
        if handoff.num_tokens != len(request.prompt):
            raise HandoffFailed(f"KV handoff of {handoff.num_tokens} tokens for a prompt of {len(request.prompt)}")
        return KvSource.parse(handoff.params, -(-handoff.num_tokens // self._config.block_size))

    # -- the loop ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Something may have become possible. What comes in the same turn of the event loop is seen in one step."""
        self._woken = True
        if self._waits:
            self._next(self._loop_().call_soon(self._turn))

    def _next(self, timer: asyncio.Handle, *, waits: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._waits = timer, waits

    def _turn(self) -> None:
        """Steps until one takes time, there is nothing to do, or others should have their turn. The event loop calls it
        again, straight from a timer: a task that sleeps would cost it two more turns for every step."""
        try:
            self._step()
        except Exception as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """The engine's last words: whatever it was, every request must hear of it."""
        _log.error("simulated engine died", exc_info=error)
        self._halt()
        self._end_all(EngineOutput(finish=FinishReason.ERROR, error=EngineFailed(f"the engine died: {error!r}")))

    def _halt(self) -> None:
        self._dead.set()
        self._waits = False
        if self._timer is not None:
            self._timer.cancel()

    def _step(self) -> None:
        loop = self._loop_()
        self._deliver_rest()
        now = loop.time()
        breath = now + _BREATH_S
        while not self._dead.is_set():
            self._woken = False
            begin = self._end if now - self._end < _BACK_TO_BACK_S else now
            plain = self._model.plain_steps(_AT_ONCE) if self._free else 0
            result = self._model.run_quiet(plain, begin) if plain else self._model.step(begin)
            if result.pulls or result.released:
                self._start_pulls(result)
            if result.steps == 0:
                self._publish(result.events)
                self._deliver_kept()
                self._wait_for_work(now)
                return
            self._end = begin + result.duration_s
            if result.duration_s:
                self._deliver_kept()  # of steps before it that took none
                self._next(loop.call_at(self._end, self._end_step, begin, result))
                return
            now = self._stepped(begin, result)
            self._keep(result.outputs)
            if not self._model.has_work:
                self._deliver_kept()
                self._wait_for_work(now)
                return
            if now > breath:
                self._deliver_kept()
                self._next(loop.call_soon(self._turn))  # after the delivery: a first token does not wait for the rest
                return

    def _end_step(self, begin: float, result: StepResult) -> None:
        try:
            self._stepped(begin, result)
            for output in result.outputs:
                self._deliver(output.sequence.request_id, output)
            self._step()
        except Exception as error:
            self._die(error)

    def _stepped(self, begin: float, result: StepResult) -> float:
        """``result`` is true now; returns the time."""
        now = self._last_step_at = self._now()
        self._steps += result.steps
        if result.timing is not None:
            self._timings.append(replace(result.timing, duration_s=max(now - begin, 0.0) / result.steps))
        self._publish(result.events)
        return now

    def _keep(self, outputs: Sequence[Output]) -> None:
        kept = self._kept
        for output in outputs:
            request_id = output.sequence.request_id
            before = kept.get(request_id)
            if before is not None:
                output.tokens = [*before.tokens, *output.tokens]
            kept[request_id] = output

    def _wait_for_work(self, now: float) -> None:
        loop, expiry = self._loop_(), self._model.next_expiry()
        if self._woken:  # by what was told just now
            self._next(loop.call_soon(self._turn))
        else:
            wait_s = _LONGEST_WAIT_S if expiry is None else max(0.001, expiry - now)
            self._next(loop.call_later(wait_s, self._turn), waits=True)

    def _deliver_kept(self) -> None:
        kept, self._kept = self._kept, {}
        for request_id, output in kept.items():
            self._deliver(request_id, output)

    def _deliver(self, request_id: str, output: Output) -> None:
        live = self._live.get(request_id)
        if live is None:  # aborted while this step ran
            if output.handoff is not None:
                self._model.release_handoff(output.handoff.handoff_id)
            return
        counts = self._counts
        if output.finish is not None:
            del self._live[request_id]
            counts.ended[output.finish] += 1
        if not live.started:
            counts.started(len(live.request.prompt), output.sequence.cached_tokens or 0)
        # Machine words from here on: who keeps them, and the frame that carries them, copy memory.
        tokens = array("I", output.tokens)
        counts.generated_tokens += len(tokens)
        live.sink(self._engine_output(tokens, output, live))
        live.started = True

    def _engine_output(self, tokens: array[int], last: Output, live: _Live) -> EngineOutput:
        sampling = live.request.sampling
        if live.started and sampling.logprobs is None and last.handoff is None:
            return EngineOutput(tokens, last.finish, last.stop_token_id)  # as after most steps
        first = not live.started
        cached = last.sequence.cached_tokens
        if live.request.embed:
            vector = hashed_embedding(live.request.prompt, self._args.embedding_size)
            return EngineOutput(finish=FinishReason.STOP, cached_tokens=cached, embedding=vector)
        logprobs = prompt_logprobs = None
        if sampling.logprobs is not None and tokens:
            count = max(1, sampling.logprobs)
            logprobs = [live.content.logprobs(token, count) for token in tokens]
        if sampling.prompt_logprobs is not None and first:
            count = max(1, sampling.prompt_logprobs)
            prompt_logprobs = [None, *(live.content.logprobs(t, count) for t in live.request.prompt[1:])]
        return EngineOutput(
            token_ids=tokens,
            finish=last.finish,
            stop_token_id=last.stop_token_id,
            cached_tokens=cached if first else None,
            transferred_bytes=live.transferred_bytes if first else None,
            transfer_s=live.transfer_s if first else None,
            transfer_ended_s=live.transfer_ended_s if first else None,
            handoff=None if last.handoff is None else self._handoff(last),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _handoff(self, output: Output) -> KvHandoff:
        handoff = output.handoff
        assert handoff is not None
        config = self._config
        source = KvSource(config.kv_host, self._kv_server.port, self._engine_id, handoff.handoff_id, handoff.blocks)
        return KvHandoff(handoff.handoff_id, self._engine_id, handoff.num_tokens, source.dump())

    def _deliver_rest(self) -> None:
        undelivered, self._undelivered = self._undelivered, []
        for sink, output in undelivered:
            sink(output)

    def _end_all(self, output: EngineOutput) -> None:
        self._deliver_rest()
        self._deliver_kept()
        live, self._live = self._live, {}
        for one in live.values():
            one.sink(output)

    def _publish(self, events: Sequence[CacheEvent]) -> None:
        if events:
            self._on_kv_events([_kv_event(event) for event in events])

    # -- the KV plane --------------------------------------------------------------------------------------------

    def _start_pulls(self, result: StepResult) -> None:
        for pull in result.pulls:
            task = asyncio.create_task(self._pull(pull, self._live[pull.request_id]), name=f"kv-pull-{pull.request_id}")
            self._pulls[pull.request_id] = task
            task.add_done_callback(self._task_ended)
        for request_id in result.released:
            task = asyncio.create_task(self._decline(self._live[request_id]), name=f"kv-notice-{request_id}")
            self._notices.add(task)
            task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._notices.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._die(error)

    async def _pull(self, pull: Pull, live: _Live) -> None:
        assert live.source is not None
        num_bytes = pull.num_blocks * self._config.block_size * self._args.kv_bytes_per_token
        began = self._now()

        def transfer_s() -> float:
            now = self._now()
            return self._link.send(now, num_bytes) - now if self._args.speedup else 0.0

        contents = None
        with suppress(TimeoutError):
            async with asyncio.timeout(min(live.source_ends - began, _LONGEST_PULL_S)):
                contents = await read_blocks(live.source, live.source.blocks[pull.first_block :], transfer_s)
        if self._now() > live.source_ends:  # this process may have been stopped for a while
            contents = None
        if contents is not None:
            live.transferred_bytes, live.transfer_ended_s = num_bytes, self._now()
            live.transfer_s = live.transfer_ended_s - began
        del self._pulls[pull.request_id]
        self._model.pull_done(pull.request_id, contents)
        self._wake()

    async def _decline(self, live: _Live) -> None:
        """All of the prompt is cached here: the producer need not hold it."""
        assert live.source is not None
        await read_blocks(live.source, (), lambda: 0.0)

    def _read_held(self, handoff_id: str, blocks: Sequence[int]) -> list[int]:
        """A consumer reads our memory."""
        self._model.expire_handoffs(self._now())
        if handoff_id not in self._model.handoffs:
            self._reads_after_expiry += 1
        return [self._model.pool.content[block] for block in blocks]

    def _done_reading(self, handoff_id: str) -> None:
        self.release_handoff(handoff_id, pulled=True)

    def _loop_(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise EngineFailed("the engine was not started")
        return self._loop

    def _now(self) -> float:
        return self._loop_().time()


def _kv_event(event: CacheEvent) -> KvEvent:
    if isinstance(event, Stored):
        return BlocksStored(event.hashes, event.parent, event.token_ids, event.lora, event.cache_salt)
    return BlocksRemoved(event.hashes) if isinstance(event, Removed) else AllBlocksCleared()
