"""The vLLM engine behind Tandem's engine port (``tandem.engine.protocol``).

vLLM's AsyncLLM in this process, its EngineCore in a child. Tokens go from AsyncLLM's output loop straight into a
request's sink: in place of vLLM's per-request queue and task there is a ``_Live``, which is that sink. Commands go to
the core through one task, in order. vLLM is imported by ``start``, after the environment that it reads is set; start
the engine before any thread of gRPC, NATS or OpenTelemetry exists, because it forks.

A handoff is vLLM's kv_transfer_params. Its id is the request's id in vLLM, and the adapter remembers how long the
producer's lease runs, counted from before the prefill ended.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from prometheus_client.registry import Collector

from tandem.core.types import FinishReason, StepTiming
from tandem.engine.handoff import CacheGroup, consumer_params, dump_params
from tandem.engine.protocol import (
    EngineConfig,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    KvEvent,
    KvHandoff,
    Logprob,
    Sink,
)
from tandem.engine.vllm_events import KvEventStream
from tandem.engine.vllm_metrics import VllmMetrics
from tandem.engine.vllm_options import VllmOptions
from tandem.engine.vllm_report import CoreReports
from tandem.engine.vllm_start import Endpoints, engine_info, first_line, start_llm
from tandem.errors import (
    ContextLengthExceeded,
    EngineFailed,
    HandoffFailed,
    InternalError,
    InvalidRequest,
    TandemError,
)
from tandem.telemetry.instruments import Instruments

log = logging.getLogger(__name__)

_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "repetition": FinishReason.STOP,
    "abort": FinishReason.ABORT,
    "error": FinishReason.ERROR,
}
_CALL_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 0.5  # then SIGKILL: the core has nothing to save
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._-]")  # vLLM's connector joins ids with "," and ":"


class VllmEngine:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._options, self._own_args = VllmOptions.split(config.args)
        self._engine_id = uuid.uuid4().hex
        self._dead = asyncio.Event()
        self._live: dict[str, _Live] = {}  # by the caller's request id
        self._leases: dict[str, float] = {}  # handoffs of ours: end by the monotonic clock
        self._reports = CoreReports(time.monotonic, "tandem")
        self._commands: asyncio.Queue[Callable[[], Coroutine[Any, Any, None]]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._groups: list[CacheGroup] = []
        self._info: EngineInfo | None = None
        self._endpoints: Endpoints | None = None
        self._llm: Any = None
        self._supported_tasks: tuple[str, ...] = ()

    # -- life ----------------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "start() first"
        return self._info

    @property
    def dead(self) -> asyncio.Event:
        return self._dead

    async def start(self, on_kv_events: Callable[[Sequence[KvEvent]], None]) -> None:
        endpoints = self._endpoints = Endpoints.of(self._config, self._engine_id)
        self._llm = start_llm(
            self._config, self._options, self._own_args, self._engine_id, endpoints, self._reports.record
        )
        self._llm.output_handler.add_done_callback(lambda _: self._died())
        self._spawn(self._send_commands())
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            self._supported_tasks = await self._llm.get_supported_tasks()
            groups = await self._llm.engine_core.call_utility_async("get_kv_cache_group_metadata")
            ranks = await self._llm.collective_rpc("describe_kv")
        self._groups = [CacheGroup(group["block_size"], group["sliding_window"]) for group in groups]
        self._info = engine_info(self._config, self._options, self._engine_id, endpoints, self._llm.vllm_config, ranks)
        counted = next((i for i, group in enumerate(groups) if group["kind"] == "full_attention"), 0)
        stream = KvEventStream(endpoints.events, endpoints.replay, counted, on_kv_events)
        self._spawn(stream.run())

    async def stop(self) -> None:
        self._stopping = True
        for live in list(self._live.values()):
            live.finish(EngineOutput(finish=FinishReason.ABORT))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._llm is not None:
            self._llm.output_handler.cancel()
            llm, self._llm = self._llm, None  # its __del__ must not wait for the interpreter's end
            await asyncio.to_thread(llm.shutdown, _STOP_TIMEOUT_S)
        if self._endpoints is not None:
            self._endpoints.remove()

    def _died(self) -> None:
        if self._stopping:
            return
        self._dead.set()
        for live in list(self._live.values()):
            live.fail(EngineFailed("the engine died"))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A background task has no reason to end but stop(): whatever ended it, the engine is of no use without it."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the engine's background task failed", exc_info=error)
            self._died()

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        loop = asyncio.get_running_loop()
        live = _Live(self, request, sink)
        try:
            if self._dead.is_set():
                raise EngineFailed("the engine died")
            if request.embed != self._config.embeds:
                makes = "embeddings" if self._config.embeds else "tokens"
                raise InvalidRequest(f"this engine makes {makes}", param="model")
            if len(request.prompt) + (not request.embed) > self.info.max_model_len:
                limit = self.info.max_model_len
                raise ContextLengthExceeded(
                    f"a prompt of {len(request.prompt)} tokens and its output do not fit {limit}", param="messages"
                )
            if request.request_id in self._live:
                raise InternalError(f"request id {request.request_id} is in use")
            core_request = self._core_request(request)
        except TandemError as e:
            loop.call_soon(sink, EngineOutput(finish=FinishReason.ERROR, error=e))
            return
        live.core_id = core_request.request_id
        self._live[request.request_id] = live
        self._reports.submitted(live.core_id, len(request.prompt))
        self._commands.put_nowait(partial(self._add, core_request, live))

    def _core_request(self, request: EngineRequest) -> Any:
        """vLLM's form of the request. HandoffFailed, or InvalidRequest for what vLLM does not accept."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest

        from tandem.engine.vllm_sampling import pooling, prefill_sampling, sampling

        try:
            if request.embed:
                params: Any = pooling()
            elif request.produce_handoff:
                if not self._config.disaggregated:
                    raise HandoffFailed("this engine has no KV transfer")
                params = prefill_sampling()
            else:
                params = sampling(request.sampling, self._transfer_params(request))
            lora = None
            if request.lora:
                if request.lora not in self._options.loras:
                    raise InvalidRequest(f"no LoRA adapter is called {request.lora!r}", param="model")
                number = list(self._options.loras).index(request.lora) + 1
                lora = LoRARequest(request.lora, number, self._options.loras[request.lora])
            core_request = self._llm.input_processor.process_inputs(
                _NOT_IN_ID.sub("_", request.request_id)[:96],
                tokens_input(list(request.prompt), cache_salt=request.cache_salt or None),
                params,
                self._supported_tasks,
                lora_request=lora,
                trace_headers=self._trace_headers(request),
                priority=request.priority,
            )
        except (ValueError, VLLMClientError) as e:
            raise InvalidRequest(first_line(e), param=getattr(e, "parameter", None)) from e
        self._llm.input_processor.assign_request_id(core_request)  # makes it unique among all engines
        return core_request

    def _transfer_params(self, request: EngineRequest) -> dict[str, Any] | None:
        if request.handoff is None:
            return None
        if not self._config.disaggregated:
            raise HandoffFailed("this engine has no KV transfer")
        if request.handoff.engine_id == self._engine_id:
            raise HandoffFailed("the handoff is this engine's own")
        if request.sampling.prompt_logprobs is not None:
            raise HandoffFailed("prompt logprobs need a local prefill")
        params = consumer_params(request.handoff, len(request.prompt), self._groups)
        if request.handoff_valid_s is not None:
            params["remote_blocks_expiry_time"] = time.monotonic() + request.handoff_valid_s
        return params

    def _trace_headers(self, request: EngineRequest) -> dict[str, str] | None:
        """vLLM makes its span of what it gets headers for, and sends it where this process's tracer provider says; its
        own exporter (``otlp_traces_endpoint``) would be a second one, here and in the core."""
        if not request.traceparent:
            return None
        self._llm.output_processor.tracing_enabled = True
        return {"traceparent": request.traceparent}

    async def _add(self, core_request: Any, live: _Live) -> None:
        if not live.done:
            await self._llm._add_request(core_request, None, None, 0, live)

    def abort(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None:
            self._commands.put_nowait(partial(self._abort, live))

    async def _abort(self, live: _Live) -> None:
        """Also when the core is done and its last output is on the way: ``live`` then ends here, nobody will get the
        handoff in it, and for the core (``StepScheduler``) the abort releases what it holds."""
        if not live.done:
            await self._llm.abort(live.core_id, internal=True)

    async def _send_commands(self) -> None:
        while True:
            command = await self._commands.get()
            if self._dead.is_set():
                continue
            try:
                await command()
            except Exception as e:
                if not self._llm.errored:
                    raise
                log.error("the engine died: %s", first_line(e))
                self._died()

    # -- handoffs ------------------------------------------------------------------------------------------------------

    def produced(self, params: dict[str, Any] | None, request: EngineRequest) -> KvHandoff:
        """The handoff of a prefill that has just ended."""
        if not params or not params.get("remote_block_ids"):
            raise HandoffFailed("the engine holds no KV for this prompt")
        handoff_id = params["remote_request_id"]
        self._leases[handoff_id] = params.pop("lease_until")
        return KvHandoff(handoff_id, self._engine_id, len(request.prompt), dump_params(params))

    def claim_handoff(self, handoff_id: str, engine_id: str) -> float | None:
        now = time.monotonic()
        for expired in [known for known, end in self._leases.items() if end <= now]:
            del self._leases[expired]
        end = self._leases.get(handoff_id)
        return None if end is None or engine_id != self._engine_id else end - now

    def release_handoff(self, handoff_id: str, *, pulled: bool) -> None:
        self._leases.pop(handoff_id, None)
        if not pulled:  # a reader tells the core by itself
            self._commands.put_nowait(partial(self._release, handoff_id))

    async def _release(self, handoff_id: str) -> None:
        """For the core (``StepScheduler``) an abort of what it holds for a reader."""
        await self._llm.engine_core.abort_requests_async([handoff_id])

    # -- state ---------------------------------------------------------------------------------------------------------

    def ended(self, live: _Live) -> None:
        self._live.pop(live.request.request_id, None)
        self._reports.finished(live.core_id)

    def take_transfer(self, live: _Live) -> tuple[int, float, float] | None:
        return self._reports.take_transfer(live.core_id)

    def stats(self) -> EngineStats:
        return self._reports.stats()

    def take_step_timings(self) -> list[StepTiming]:
        return self._reports.take_step_timings()

    def expose(self, instruments: Instruments) -> Sequence[Collector]:
        return (VllmMetrics(),)

    async def reset_prefix_cache(self) -> None:
        """Running requests are computed again, if need be. EngineFailed when blocks are held for KV transfers."""
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            for running_too in (False, True):
                if await self._llm.reset_prefix_cache(reset_running_requests=running_too):
                    return
        raise EngineFailed("the prefix cache was not reset: blocks are held for KV transfers")


class _Live:
    """A request in flight. For vLLM's output loop it is the queue into which it puts outputs."""

    def __init__(self, engine: VllmEngine, request: EngineRequest, sink: Sink) -> None:
        self.request = request
        self.core_id = ""
        self.done = False
        self._engine = engine
        self._sink = sink
        self._first = True

    def put(self, output: Any) -> None:
        if isinstance(output, Exception):
            return self.fail(EngineFailed(first_line(output)))
        try:
            news = self._translate(output)
        except TandemError as e:
            return self.fail(e)
        if news is None:
            return None
        if news.finish is not None:
            return self.finish(news)
        if not self.done:
            self._tell(news)
        return None

    def finish(self, news: EngineOutput) -> None:
        if not self.done:
            self.done = True
            self._engine.ended(self)
            self._tell(news)

    def fail(self, error: TandemError) -> None:
        self.finish(EngineOutput(finish=FinishReason.ERROR, error=error))

    def _tell(self, news: EngineOutput) -> None:
        """A sink that raises must not end vLLM's output loop, and with it all other requests."""
        try:
            self._sink(news)
        except Exception as e:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"the sink of request {self.request.request_id} failed", "exception": e}
            )

    def _translate(self, output: Any) -> EngineOutput | None:
        if self.request.embed:
            return self._embedded(output)
        return self._prefilled(output) if self.request.produce_handoff else self._news(output)

    def _embedded(self, output: Any) -> EngineOutput | None:
        if not output.finished:
            return None
        vector: bytes = output.outputs.data.float().numpy().astype("<f4").tobytes()
        return EngineOutput(finish=FinishReason.STOP, cached_tokens=output.num_cached_tokens or 0, embedding=vector)

    def _prefilled(self, output: Any) -> EngineOutput | None:
        if not output.finished:
            return None
        finish = _FINISH[output.outputs[0].finish_reason]
        if finish in (FinishReason.ABORT, FinishReason.ERROR):
            return self._ending(finish)
        handoff = self._engine.produced(output.kv_transfer_params, self.request)
        return EngineOutput(finish=FinishReason.LENGTH, cached_tokens=output.num_cached_tokens or 0, handoff=handoff)

    def _ending(self, finish: FinishReason) -> EngineOutput:
        error = EngineFailed("the engine could not serve this request") if finish is FinishReason.ERROR else None
        return EngineOutput(finish=finish, error=error)

    def _news(self, output: Any) -> EngineOutput | None:
        completion = output.outputs[0]
        tokens: Sequence[int] = completion.token_ids
        finish = _FINISH[completion.finish_reason] if output.finished else None
        if finish is FinishReason.ERROR:
            return self._ending(finish)
        stop_token_id = None
        if finish is FinishReason.STOP:
            reason = completion.stop_reason  # None when it was the end-of-sequence token
            stop_token_id = reason if isinstance(reason, int) else None
        cached = transferred = seconds = ended_s = None
        if self._first and (tokens or finish):
            self._first = False
            cached = output.num_cached_tokens or 0
            if (pulled := self._engine.take_transfer(self)) is not None:
                cached = max(0, cached - pulled[0])
                transferred = pulled[0] * self._engine.info.kv_bytes_per_token
                seconds, ended_s = pulled[1], pulled[2]
        return EngineOutput(
            token_ids=tokens,
            finish=finish,
            stop_token_id=stop_token_id,
            cached_tokens=cached,
            transferred_bytes=transferred,
            transfer_s=seconds,
            transfer_ended_s=ended_s,
            logprobs=None if not completion.logprobs else [_candidates(at) for at in completion.logprobs],
            prompt_logprobs=(
                None
                if not output.prompt_logprobs
                else [None if at is None else _candidates(at) for at in output.prompt_logprobs]
            ),
        )


def _candidates(position: dict[int, Any]) -> list[Logprob]:
    """vLLM puts the sampled (or the prompt's own) token first."""
    return [(token, candidate.logprob, candidate.rank or 0) for token, candidate in position.items()]
