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
import contextlib
import dataclasses
import errno
import importlib
import importlib.metadata
import logging
import multiprocessing
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from tandem.core.types import FinishReason, StepTiming
from tandem.engine import launcher
from tandem.engine.handoff import CacheGroup, consumer_params, dump_params
from tandem.engine.lifeline import die_with_parent
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
from tandem.engine.vllm_options import VllmOptions, engine_args, environment, kv_transfer_args
from tandem.engine.vllm_report import CoreReports
from tandem.errors import ConfigError, EngineFailed, HandoffFailed, InvalidRequest, TandemError

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
        self._commands: asyncio.Queue[Coroutine[Any, Any, None]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._groups: list[CacheGroup] = []
        self._info: EngineInfo | None = None
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
        kv_port = _check_port(self._config.kv_host, self._config.kv_port) if self._config.disaggregated else 0
        required, defaults = environment(self._config, self._options, kv_port)
        os.environ.update(required)
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        os.makedirs(self._config.run_dir, exist_ok=True)
        self._llm = self._make_llm()
        self._llm.output_handler.add_done_callback(lambda _: self._died())
        self._spawn(self._send_commands())
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            self._supported_tasks = await self._llm.get_supported_tasks()
            groups = await self._llm.engine_core.call_utility_async("get_kv_cache_group_metadata")
            ranks = await self._llm.collective_rpc("describe_kv")
        self._groups = [CacheGroup(group["block_size"], group["sliding_window"]) for group in groups]
        self._info = self._make_info(ranks, kv_port)
        counted = next((i for i, group in enumerate(groups) if group["kind"] == "full_attention"), 0)
        stream = KvEventStream(self._endpoint("kv"), self._endpoint("replay"), counted, on_kv_events)
        self._spawn(stream.run())

    def _make_llm(self) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig
        from vllm.config.kv_events import KVEventsConfig
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        cpu = current_platform.is_cpu()
        args = engine_args(self._config, self._own_args, cpu=cpu, parent_pid=os.getpid())
        if unknown := set(args) - {f.name for f in dataclasses.fields(AsyncEngineArgs)}:
            raise ConfigError(f"vLLM has no engine argument {', '.join(sorted(unknown))}", param="engine_args")
        if cpu and args.get("enforce_eager"):
            # The first request with logprobs would compile a helper for seconds, eager or not.
            importlib.import_module("torch._dynamo").config.disable = True
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        if self._config.disaggregated:
            args["kv_transfer_config"] = KVTransferConfig(**kv_transfer_args(self._config, self._engine_id, cpu=cpu))
        args["kv_events_config"] = KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=self._endpoint("kv"),
            replay_endpoint=self._endpoint("replay"),
        )
        if self._options.loras:
            args.setdefault("enable_lora", True)
            args.setdefault("max_loras", len(self._options.loras))
        try:
            vllm_config = AsyncEngineArgs(**args).create_engine_config()
        except (ValueError, TypeError, OSError) as e:
            raise ConfigError(f"vLLM refuses this configuration: {_first_line(e)}", param="engine_args") from e
        _check_room(vllm_config)
        try:
            with self._start_method():
                return AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[self._stat_logger], disable_log_stats=True)
        except (RuntimeError, TimeoutError, OSError) as e:
            raise EngineFailed(f"vLLM did not start: {_first_line(e)} (its log is above)") from e

    @contextlib.contextmanager
    def _start_method(self) -> Iterator[None]:
        """Under the fork launcher the EngineCore is forked too, though vLLM insists on spawn for CPUs."""
        method = self._options.start_method
        if method == "spawn" or (method == "auto" and not launcher.is_forked()):
            yield
            return
        utils: Any = importlib.import_module("vllm.v1.engine.utils")
        original = utils.get_mp_context
        utils.get_mp_context = _fork_context
        try:
            yield
        finally:
            utils.get_mp_context = original

    def _stat_logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        from vllm.v1.metrics.loggers import StatLoggerBase

        reports = self._reports

        class Recorder(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
                preempted = 0 if iteration_stats is None else iteration_stats.num_preempted_reqs
                reports.record(None if scheduler_stats is None else scheduler_stats.kv_connector_stats, preempted)
                if scheduler_stats is not None and not scheduler_stats.kv_connector_stats:
                    scheduler_stats.kv_connector_stats = None  # as the loggers after this one expect

            def log_engine_initialized(self) -> None:
                pass

        return Recorder()

    def _make_info(self, ranks: list[dict[str, Any]], kv_port: int) -> EngineInfo:
        vllm_config = self._llm.vllm_config
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        cpu = vllm_config.device_config.device_type == "cpu"
        layout = ranks[0]["layout"] or "default"
        return EngineInfo(
            engine="vllm",
            engine_version=_vllm_version(),
            engine_id=self._engine_id,
            dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
            kv_layout=f"{layout}/{cache.cache_dtype}",
            block_size=cache.block_size,
            max_model_len=vllm_config.model_config.max_model_len,
            kv_blocks_total=ranks[0]["num_blocks"] - 1,  # one is vLLM's null block
            kv_bytes_per_token=sum(rank["block_bytes"] for rank in ranks) // cache.block_size,
            max_batched_tokens=scheduler.max_num_batched_tokens,
            max_num_seqs=scheduler.max_num_seqs,
            perf_profile=self._options.perf_profile or ("cpu-smollm2" if cpu else "generic"),
            kv_endpoint=f"{self._config.kv_host}:{kv_port}" if self._config.disaggregated else "",
            link_bytes_per_s=self._options.link_bytes_per_s,
        )

    def _endpoint(self, name: str) -> str:
        """Unix sockets have short paths (108 bytes), so the worker's id is not in it: the folder is its own."""
        return f"ipc://{self._config.run_dir}/{name}-{self._engine_id[:8]}.sock"

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
            for name in ("kv", "replay"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._endpoint(name).removeprefix("ipc://"))

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
            if request.request_id in self._live:
                raise InvalidRequest(f"request id {request.request_id} is in use", param="request_id")
            core_request = self._core_request(request)
        except TandemError as e:
            loop.call_soon(sink, EngineOutput(finish=FinishReason.ERROR, error=e))
            return
        live.core_id = core_request.request_id
        self._live[request.request_id] = live
        self._reports.submitted(live.core_id, len(request.prompt))
        self._commands.put_nowait(self._add(core_request, live))

    def _core_request(self, request: EngineRequest) -> Any:
        """vLLM's form of the request. HandoffFailed, or InvalidRequest for what vLLM does not accept."""
        from vllm.inputs.engine import tokens_input
        from vllm.lora.request import LoRARequest

        from tandem.engine.vllm_sampling import prefill_sampling, sampling

        try:
            if request.produce_handoff:
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
        except ValueError as e:
            raise InvalidRequest(_first_line(e), param=getattr(e, "parameter", None)) from e
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
        if not request.traceparent or self._llm.observability_config.otlp_traces_endpoint is None:
            return None
        return {"traceparent": request.traceparent}

    async def _add(self, core_request: Any, live: _Live) -> None:
        if not live.done:
            await self._llm._add_request(core_request, None, None, 0, live)

    def abort(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None:
            self._commands.put_nowait(self._abort(live))

    async def _abort(self, live: _Live) -> None:
        # To the core even when its last output is on the way: it may hold the blocks of a handoff that nobody will get.
        await self._llm.abort(live.core_id, internal=True)
        await self._llm.engine_core.abort_requests_async([live.core_id])
        live.finish(EngineOutput(finish=FinishReason.ABORT))

    async def _send_commands(self) -> None:
        while True:
            command = await self._commands.get()
            if self._dead.is_set():
                command.close()
                continue
            try:
                await command
            except Exception as e:
                if not self._llm.errored:
                    raise
                log.error("the engine died: %s", _first_line(e))
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
        if self._leases.pop(handoff_id, None) is not None and not pulled:  # a reader tells the core by itself
            self._commands.put_nowait(self._release(handoff_id))

    async def _release(self, handoff_id: str) -> None:
        """For the core (``StepScheduler``) an abort of what it holds for a reader."""
        await self._llm.engine_core.abort_requests_async([handoff_id])

    # -- state ---------------------------------------------------------------------------------------------------------

    def ended(self, live: _Live) -> None:
        self._live.pop(live.request.request_id, None)
        self._reports.finished(live.core_id)

    def take_transfer(self, live: _Live) -> tuple[int, float] | None:
        return self._reports.take_transfer(live.core_id)

    def stats(self) -> EngineStats:
        return self._reports.stats()

    def take_step_timings(self) -> list[StepTiming]:
        return self._reports.take_step_timings()

    async def reset_prefix_cache(self) -> None:
        """EngineFailed when blocks are in use: vLLM then keeps the cache."""
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            if not await self._llm.reset_prefix_cache():
                raise EngineFailed("the prefix cache was not reset: blocks are in use")


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
            return self.fail(EngineFailed(_first_line(output)))
        try:
            news = self._prefilled(output) if self.request.produce_handoff else self._news(output)
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
            stop_token_id = reason if isinstance(reason, int) else tokens[-1] if tokens else None
        cached = transferred = seconds = None
        if self._first and (tokens or finish):
            self._first = False
            cached = output.num_cached_tokens or 0
            if (pulled := self._engine.take_transfer(self)) is not None:
                cached = max(0, cached - pulled[0])
                transferred = pulled[0] * self._engine.info.kv_bytes_per_token
                seconds = pulled[1]
        return EngineOutput(
            token_ids=tokens,
            finish=finish,
            stop_token_id=stop_token_id,
            cached_tokens=cached,
            transferred_bytes=transferred,
            transfer_s=seconds,
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


def _check_port(host: str, port: int) -> int:
    """The port to use (0: a free one). vLLM's listener would fail in a thread and leave the start waiting forever."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, port))
        except OSError as e:
            what = "in use" if e.errno == errno.EADDRINUSE else f"not usable ({e.strerror})"
            raise ConfigError(f"port {port} on {host} for KV transfer is {what}", param="TANDEM_KV_PORT") from e
        return int(probe.getsockname()[1])


def _check_room(vllm_config: Any) -> None:
    """One sequence of full length must fit into the KV cache; vLLM would say so only in the child's log."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    given = cache.kv_cache_memory_bytes
    if given is None or model.use_mla:
        return
    itemsize = importlib.import_module("torch").tensor([], dtype=model.dtype).element_size()
    heads, layers = (
        model.get_num_kv_heads(vllm_config.parallel_config),
        model.get_num_layers(vllm_config.parallel_config),
    )
    needed = 2 * layers * heads * model.get_head_size() * itemsize * (model.max_model_len + 2 * cache.block_size)
    if cache.cache_dtype == "auto" and needed > given:
        raise ConfigError(
            f"kv_cache_memory_bytes is {given >> 20} MiB, but one sequence of max_model_len {model.max_model_len} "
            f"needs {-(-needed >> 20)} MiB: raise kv_cache_memory_bytes in engine_args or lower max_model_len",
            param="engine_args",
        )


def _fork_context() -> Any:
    """A multiprocessing context that forks, and whose children do not outlive this process."""
    context: Any = multiprocessing.get_context("fork")
    parent_pid = os.getpid()

    class Process(context.Process):
        def run(self) -> None:
            die_with_parent(parent_pid)
            super().run()

    context.Process = Process
    return context


def _vllm_version() -> str:
    import vllm

    return str(vllm.__version__)


def _first_line(error: BaseException) -> str:
    """Of the message; pydantic's begins with a count."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:3]) if "validation error" in lines[0] else lines[0]
