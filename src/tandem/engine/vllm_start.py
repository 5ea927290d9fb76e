"""Makes vLLM's AsyncLLM from what ``vllm_options`` says, and finds a user's mistakes before vLLM does: what goes wrong
in its child process reaches a person only as a log.

Everything here blocks, and forks or spawns from the calling thread: the main thread, while it is the only one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib
import json
import multiprocessing
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tandem.engine import launcher
from tandem.engine.protocol import EngineConfig, EngineInfo
from tandem.engine.vllm_options import VllmOptions, engine_args, environment, kv_transfer_args
from tandem.errors import ConfigError, EngineFailed
from tandem.parent_death import die_with_parent

_SOCKET_PATH_MAX = 107
#: ioctl of Linux: an interface's IPv4 address.
_SIOCGIFADDR = 0x8915

#: (SchedulerStats.kv_connector_stats, preemptions) of a step.
Record = Callable[[dict[str, Any] | None, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoints:
    """Where this engine's process listens."""

    events: str
    replay: str
    kv_port: int

    @classmethod
    def of(cls, config: EngineConfig, engine_id: str) -> Endpoints:
        """Free ones. ConfigError: the KV port is taken, or the run directory's path is too long."""
        # The folder is this worker's own; a restarted engine must not meet its predecessor's subscribers.
        events, replay = (f"{config.run_dir}/{name}-{engine_id[:8]}.sock" for name in ("kv", "replay"))
        if len(replay.encode()) > _SOCKET_PATH_MAX:
            raise ConfigError(f"the run directory's path is too long for a unix socket: {replay}", param="run_dir")
        kv_port = _free_port(config.kv_host, config.kv_port) if config.disaggregated else 0
        return cls(f"ipc://{events}", f"ipc://{replay}", kv_port)

    def remove(self) -> None:
        for endpoint in (self.events, self.replay):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(endpoint.removeprefix("ipc://"))


def start_llm(config: EngineConfig, options: VllmOptions, own: dict[str, Any], engine_id: str,
              endpoints: Endpoints, record: Record) -> Any:  # fmt: skip
    """A running AsyncLLM. ConfigError for what the user can mend, EngineFailed else."""
    required, defaults = environment(config, options, endpoints.kv_port, kv_device=_device_of(config.kv_host))
    os.environ.update(required)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.makedirs(config.run_dir, exist_ok=True)
    # The core would make a tracer and an exporter of its own of it. Whoever reads it here has read it before.
    os.environ.pop("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", None)
    vllm_config = _vllm_config(config, options, own, engine_id, endpoints)
    _check_room(vllm_config)
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        with _start_method(options.start_method):
            return AsyncLLM.from_vllm_config(
                vllm_config, stat_loggers=[lambda vllm_config, index: _recorder(record)], disable_log_stats=True
            )
    except (RuntimeError, TimeoutError, OSError) as e:
        raise EngineFailed(f"vLLM did not start: {first_line(e)} (its log is above)") from e


def engine_info(
    config: EngineConfig, options: VllmOptions, engine_id: str, endpoints: Endpoints, vllm_config: Any, ranks: Any
) -> EngineInfo:
    """``ranks``: what each worker of vLLM said of its KV cache (``WorkerExtension.describe_kv``)."""
    import vllm

    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    cpu = vllm_config.device_config.device_type == "cpu"
    kv_blocks = ranks[0]["num_blocks"] - 1  # one is vLLM's null block
    if _keeps_no_kv(vllm_config.model_config):  # then its batch is the limit
        kv_blocks = scheduler.max_num_seqs * -(-vllm_config.model_config.max_model_len // cache.block_size)
    return EngineInfo(
        engine="vllm",
        engine_version=vllm.__version__,
        engine_id=engine_id,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
        kv_layout=f"{ranks[0]['layout'] or 'default'}/{cache.cache_dtype}",
        block_size=cache.block_size,
        max_model_len=vllm_config.model_config.max_model_len,
        kv_blocks_total=kv_blocks,
        kv_bytes_per_token=sum(rank["block_bytes"] for rank in ranks) // cache.block_size,
        max_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        perf_profile=options.perf_profile or ("cpu-smollm2" if cpu else "generic"),
        kv_endpoint=f"{config.kv_host}:{endpoints.kv_port}" if config.disaggregated else "",
        link_bytes_per_s=options.link_bytes_per_s,
    )


def _keeps_no_kv(model_config: Any) -> bool:
    """An encoder: attention over the whole prompt, in one step."""
    return bool(model_config.attn_type == "encoder_only")


def first_line(error: BaseException) -> str:
    """Of the message; pydantic's begins with a count."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:3]) if "validation error" in lines[0] else lines[0]


def _vllm_config(
    config: EngineConfig, options: VllmOptions, own: dict[str, Any], engine_id: str, endpoints: Endpoints
) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.config import KVTransferConfig
    from vllm.config.kv_events import KVEventsConfig
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    slow_bf16 = cpu and config.dtype == "auto" and not _is_quantised(config.model_path) and not multiplies_bf16()
    args = engine_args(config, own, cpu=cpu, parent_pid=os.getpid(), slow_bf16=slow_bf16)
    if unknown := set(args) - {f.name for f in dataclasses.fields(AsyncEngineArgs)}:
        raise ConfigError(f"vLLM has no engine argument {', '.join(sorted(unknown))}", param="engine_args")
    if cpu and args.get("enforce_eager"):
        # The first request with logprobs would compile a helper for seconds, eager or not.
        importlib.import_module("torch._dynamo").config.disable = True
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if config.disaggregated:
        args["kv_transfer_config"] = KVTransferConfig(**kv_transfer_args(config, engine_id, cpu=cpu))
    args["kv_events_config"] = KVEventsConfig(
        enable_kv_cache_events=True, publisher="zmq", endpoint=endpoints.events, replay_endpoint=endpoints.replay
    )
    if options.loras:
        args.setdefault("enable_lora", True)
        args.setdefault("max_loras", len(options.loras))
    try:
        vllm_config = AsyncEngineArgs(**args).create_engine_config()
    except (ValueError, TypeError, OSError) as e:
        raise ConfigError(f"vLLM refuses this configuration: {first_line(e)}", param="engine_args") from e
    scheduler = vllm_config.scheduler_config
    kind = "AsyncStepScheduler" if scheduler.async_scheduling else "StepScheduler"
    scheduler.scheduler_cls = f"tandem.engine.vllm_core.{kind}"
    return vllm_config


def _recorder(record: Record) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):
        def __init__(self) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            preempted = 0 if iteration_stats is None else iteration_stats.num_preempted_reqs
            record(None if scheduler_stats is None else scheduler_stats.kv_connector_stats, preempted)
            if scheduler_stats is not None and not scheduler_stats.kv_connector_stats:
                scheduler_stats.kv_connector_stats = None  # as the loggers after this one expect

        def log_engine_initialized(self) -> None:
            pass

    return Recorder()


@contextlib.contextmanager
def _start_method(wanted: str) -> Iterator[None]:
    """Under the fork launcher the EngineCore is forked too, though vLLM insists on spawn for CPUs."""
    if wanted == "spawn" or (wanted == "auto" and not launcher.is_forked()):
        yield
        return
    utils: Any = importlib.import_module("vllm.v1.engine.utils")
    original = utils.get_mp_context
    utils.get_mp_context = _fork_context
    try:
        yield
    finally:
        utils.get_mp_context = original


def _fork_context() -> Any:
    """A multiprocessing context that forks, and whose children do not outlive this process."""
    context: Any = multiprocessing.get_context("fork")
    parent_pid = os.getpid()

    class Process(context.Process):
        def run(self) -> None:
            signal.set_wakeup_fd(-1)  # inherited: a signal to the child would wake the parent's event loop
            die_with_parent(parent_pid)
            super().run()

    context.Process = Process
    return context


def _free_port(host: str, port: int) -> int:
    """The port to use (0: a free one). vLLM's listener would fail in a thread and leave the start waiting forever."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, port))
        except OSError as e:
            what = "in use" if e.errno == errno.EADDRINUSE else f"not usable ({e.strerror})"
            raise ConfigError(f"port {port} on {host} for KV transfer is {what}", param="TANDEM_KV_PORT") from e
        return int(probe.getsockname()[1])


def _device_of(address: str) -> str:
    """The network interface that has this IPv4 address; empty if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return ""


def multiplies_bf16() -> bool:
    """Whether oneDNN, which does the CPU's matrix products, is fast at it: AVX-512 or better, or Arm's extension."""
    return bool(importlib.import_module("torch").ops.mkldnn._is_mkldnn_bf16_supported())


def _is_quantised(model_path: str) -> bool:
    """vLLM's kernels for these choose the type themselves."""
    try:
        return "quantization_config" in json.loads((Path(model_path) / "config.json").read_bytes())
    except (OSError, ValueError):  # vLLM says what is wrong with it
        return False


def _check_room(vllm_config: Any) -> None:
    """One sequence of full length must fit into the KV cache; vLLM would say so only in the child's log."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    given = cache.kv_cache_memory_bytes
    if given is None or model.use_mla or _keeps_no_kv(model):
        return
    itemsize = importlib.import_module("torch").tensor([], dtype=model.dtype).element_size()
    heads, layers = (
        model.get_num_kv_heads(vllm_config.parallel_config),
        model.get_num_layers(vllm_config.parallel_config),
    )
    needed = 2 * layers * heads * model.get_head_size() * itemsize * (model.max_model_len + 2 * cache.block_size)
    if cache.cache_dtype == "auto" and needed > given:
        raise ConfigError(
            f"kv_cache_memory_bytes is {given >> 20} MiB, but one sequence of max_model_len {model.max_model_len} in "
            f"{str(model.dtype).removeprefix('torch.')} needs {-(-needed >> 20)} MiB: raise kv_cache_memory_bytes in "
            "engine_args or lower max_model_len",
            param="engine_args",
        )
