"""From EngineConfig to vLLM's arguments and environment. Pure, and needs no vLLM.

``EngineConfig.args`` are vLLM's own AsyncEngineArgs, which win over every default here, and the few options of the
adapter itself (``VllmOptions``). On a CPU the defaults are those that were measured to work there; on other devices
only what the protocol needs is set.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass, field
from typing import Any

from tandem.engine.protocol import EngineConfig
from tandem.errors import ConfigError

#: Two steps are under way at a time, and an abort waits for both: together they should stay under a second. With 512
#: tokens KV was free 1.1 s after a cancelled prefill of SmolLM2-135M, with 256 after 0.6 s, at the same time to the
#: first token (tests/e2e/test_real_faults.py prints it).
_CPU_CHUNK_TOKENS = 256
_CPU_KV_BYTES = 512 << 20  # of 16 bits; of 32 twice as much
_CPU_SEQUENCES = 32
#: The CPU attention kernel's granularity.
_CPU_BLOCK_MULTIPLE = 32


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """The adapter's own keys in ``engine_args``."""

    #: UCX transports between engines. Shared memory and cross-memory attach where both are on one host, TCP else.
    ucx_tls: str = "posix,cma,self,tcp"
    #: How the EngineCore process starts: fork (only under the fork launcher), spawn, or auto.
    start_method: str = "auto"
    #: Name of the performance model's starting point; empty = by device.
    perf_profile: str = ""
    link_bytes_per_s: float = 1e9
    #: LoRA adapters by name: their folders.
    loras: dict[str, str] = field(default_factory=dict)

    @classmethod
    def split(cls, args: dict[str, object]) -> tuple[VllmOptions, dict[str, Any]]:
        """The adapter's options, and what is left for vLLM."""
        own = {f.name for f in dataclasses.fields(cls)}
        options = cls(**{k: v for k, v in args.items() if k in own})  # type: ignore[arg-type]
        if options.start_method not in ("auto", "fork", "spawn"):
            raise ConfigError(f"start_method is {options.start_method!r}; auto, fork or spawn", param="engine_args")
        return options, {k: v for k, v in args.items() if k not in own}


#: UCX transports that leave the machine by IP alone, or not at all.
_IP_TRANSPORTS = frozenset(
    {"tcp", "self", "posix", "sysv", "sm", "shm", "cma", "knem", "xpmem", "cuda_copy", "cuda_ipc"}
)


def environment(
    config: EngineConfig, options: VllmOptions, kv_port: int, *, kv_device: str = ""
) -> tuple[dict[str, str], dict[str, str]]:
    """(what must be set, what is set unless the user has set it). Before vLLM is imported. ``kv_device``: the network
    interface that has ``kv_host``; empty = not known."""
    required = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": config.kv_host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(kv_port),
    }
    defaults = {
        "OMP_NUM_THREADS": "1",  # engines share the cores; two of them with spinning teams are ten times slower
        "VLLM_HOST_IP": config.kv_host,
        "VLLM_NO_USAGE_STATS": "1",
        # Libraries that talk a lot while they start; what goes wrong later, the adapter says.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "NIXL_LOG_LEVEL": "WARN",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",  # models are folders
        "UCX_TLS": options.ucx_tls,
        "UCX_RCACHE_MAX_UNRELEASED": "1024",  # vLLM's own advice against a leak of UCX
    }
    # UCX would listen on every interface. With RDMA among the transports the device is another one, and UCX's choice.
    if _is_loopback(config.kv_host):
        defaults["UCX_NET_DEVICES"] = "lo"
    elif kv_device and set(options.ucx_tls.split(",")) <= _IP_TRANSPORTS:
        defaults["UCX_NET_DEVICES"] = kv_device
    return required, defaults


def engine_args(
    config: EngineConfig, own: dict[str, Any], *, cpu: bool, parent_pid: int, slow_bf16: bool = False
) -> dict[str, Any]:
    """AsyncEngineArgs as a dict, without KV transfer and KV events. ``slow_bf16``: a prompt in bfloat16 takes six times
    as long as in float32 here (``make bench-engine ARGS='--parts overhead --dtype ...'``), so ``auto`` is the latter.
    """
    dtype = "float32" if slow_bf16 and config.dtype == "auto" else config.dtype
    args: dict[str, Any] = {
        "model": config.model_path,
        "served_model_name": config.served_model,
        "max_model_len": config.max_model_len,
        "block_size": config.block_size,
        "dtype": dtype,
        "scheduling_policy": "priority",
        "enable_prefix_caching": True,
        "disable_log_stats": True,  # our own logger still gets them; vLLM's prints lines
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # sampling defaults are the frontend's business
        "worker_extension_cls": "tandem.engine.vllm_core.WorkerExtension",
    }
    if cpu:
        args |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": _CPU_KV_BYTES * (2 if dtype == "float32" else 1),
            "max_num_batched_tokens": _CPU_CHUNK_TOKENS,
            "max_num_seqs": _CPU_SEQUENCES,
            "distributed_executor_backend": "tandem.engine.vllm_core.CpuExecutor",
        }
    if config.embeds:
        args |= {"runner": "pooling"}
        del args["enable_prefix_caching"]  # vLLM knows which of these models can
        if cpu:  # an encoder takes a prompt in one piece
            args["max_num_batched_tokens"] = max(_CPU_CHUNK_TOKENS, config.max_model_len)
    args |= own
    args["additional_config"] = {**args.get("additional_config", {}), "parent_pid": parent_pid}
    if cpu and args["block_size"] % _CPU_BLOCK_MULTIPLE:
        raise ConfigError(
            f"block_size is {args['block_size']}; on a CPU vLLM needs a multiple of {_CPU_BLOCK_MULTIPLE}",
            param="block_size",
        )
    return args


def kv_transfer_args(config: EngineConfig, engine_id: str, *, cpu: bool) -> dict[str, Any]:
    """KVTransferConfig as a dict. ``kv_both``: which role a worker has is the router's business, at any time."""
    args: dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_connector_module_path": "tandem.engine.vllm_core",
        "kv_role": "kv_both",
        "engine_id": engine_id,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": config.kv_lease_s},
    }
    if cpu:
        args["kv_buffer_device"] = "cpu"
    return args


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
