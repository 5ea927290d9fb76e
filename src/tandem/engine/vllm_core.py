"""What runs inside vLLM's EngineCore process. vLLM imports this by dotted names; nothing else of ours does.

* ``CpuExecutor``: the worker in the EngineCore process itself, with two repairs of NIXL on CPUs.
* ``StepScheduler``: vLLM's scheduler, which also says what each step was and took (vLLM's own statistics cannot tell
  prefill from decode, or give blocks in use as a number).
* ``NixlConnector``: vLLM's, with leases that hold: a read that has not ended before the time that the producer
  promised counts as failed (the engine then recomputes), and a producer can let go of blocks before their lease ends.
* ``WorkerExtension``: the calls that reach the connector from outside.

Written against vLLM 0.32. vLLM calls none of these interfaces stable: tests/contract/test_engine.py guards them.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import KVEventBatch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from tandem.parent_death import die_with_parent

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, ReqMeta
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as _AnyScheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request
else:
    _AnyScheduler = object

#: Under this key the scheduler's report travels in SchedulerStats.kv_connector_stats.
REPORT = "tandem"
#: While nothing changes, an engine that only waits for KV transfers reports this often that it is alive.
_REPORT_EVERY_S = 0.2
#: A producer remembers blocks that it let go for so long, to know late notifications about them.
_REMEMBER_RELEASED_S = 120.0
#: How long UCX's progress thread may sleep at most; what arrives wakes it.
_NIXL_PROGRESS_DELAY_US = 20_000


# -- executor ----------------------------------------------------------------------------------------------------------


class CpuExecutor(UniProcExecutor):
    def _init_executor(self) -> None:
        die_with_parent(int(self.vllm_config.additional_config["parent_pid"]))
        _calm_nixl_progress()
        from vllm.platforms.cpu import CpuPlatform

        # NIXL's worker would pin every engine of the machine to the last core of each NUMA node.
        CpuPlatform.discover_numa_topology = classmethod(lambda cls: [])
        super()._init_executor()


def _calm_nixl_progress() -> None:
    """NIXL's Python API lets UCX's progress thread spin (pthrDelay 0), a core per engine. Any delay: event-driven."""
    import nixl  # noqa: F401  (puts the build that is installed into sys.modules)

    api: Any = sys.modules["nixl._api"]
    if not isinstance(api.nixlBind, _CalmBindings):
        api.nixlBind = _CalmBindings(api.nixlBind)


class _CalmBindings:
    def __init__(self, bindings: Any) -> None:
        self._bindings = bindings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def nixlAgent(self, name: str, config: Any) -> Any:
        config.pthrDelay = _NIXL_PROGRESS_DELAY_US
        return self._bindings.nixlAgent(name, config)


# -- scheduler ---------------------------------------------------------------------------------------------------------


class _StepAccounting(_AnyScheduler):
    """Mixed into a scheduler of vLLM.

    A step is measured from the start of its scheduling, or the end of the step before where they overlap, to the end
    of its output processing: what a request in it waits for, except the way to the parent process.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        die_with_parent(int(vllm_config.additional_config["parent_pid"]))
        self._accepted: list[str] = []
        self._steps = 0
        self._open_steps: deque[tuple[float, list[int]]] = deque()
        self._last_end = 0.0
        self._last_step: list[float] | None = None
        self._last_report: list[int] = []
        self._last_report_at = 0.0

    def add_request(self, request: Request) -> None:
        self._accepted.append(request.request_id)
        super().add_request(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> Any:
        """An abort of a request that has ended, but whose KV is held for a reader, lets the KV go."""
        ids = [request_ids] if isinstance(request_ids, str) else None if request_ids is None else list(request_ids)
        for request_id in ids or ():
            request = self.requests.get(request_id)
            if request is not None and _is_held(request):
                self.connector.release(request_id)
        return super().finish_requests(ids, finished_status)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM publishes events with steps only, and an idle engine makes none; where it cannot reset, it raises."""
        try:
            reset: bool = super().reset_prefix_cache(*args, **kwargs)
        except RuntimeError:
            reset = False
        if events := self.kv_cache_manager.take_events():
            self.kv_event_publisher.publish(KVEventBatch(ts=time.time(), events=events))
        return reset

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        began = time.monotonic()
        output: SchedulerOutput = super().schedule(*args, **kwargs)
        self._open_steps.append((began, self._shape(output)))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        result = super().update_from_output(scheduler_output, *args, **kwargs)
        self._open_steps.popleft()
        return result

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM asks at the end of each step, also of the thousand a second in which it only polls for transfers."""
        now = time.monotonic()
        step = self._end_step(now)
        report = self._report()
        connector_stats = kwargs.get("kv_connector_stats") or (args[1] if len(args) > 1 else None)
        transfers = self.connector.take_transfers() if isinstance(self.connector, NixlConnector) else []
        quiet = step is None and report == self._last_report and not transfers and not self._accepted
        if quiet and connector_stats is None and now - self._last_report_at < _REPORT_EVERY_S:
            return None
        self._last_report, self._last_report_at = report, now
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            payload = {"load": report, "step": step, "transfers": transfers, "accepted": self._accepted}
            self._accepted = []
            stats.kv_connector_stats = (stats.kv_connector_stats or {}) | {REPORT: payload}
        return stats

    def _end_step(self, now: float) -> list[float] | None:
        """[seconds, prefill tokens, their context, decode sequences, KV tokens they read] of the step that ends."""
        if not self._open_steps:
            return None
        began, shape = self._open_steps[0]
        began, self._last_end = max(began, self._last_end), now
        if not any(shape):
            return None
        self._steps += 1
        return [now - began, *shape]

    def _shape(self, output: SchedulerOutput) -> list[int]:
        prefill = context = decodes = kv = 0
        for request_id, tokens in output.num_scheduled_tokens.items():
            before = self.requests[request_id].num_computed_tokens - tokens
            if tokens == 1:  # also the one prompt token that is computed again after a pull
                decodes += 1
                kv += before + 1
            else:
                prefill += tokens
                context += tokens * before + tokens * (tokens - 1) // 2
        return [prefill, context, decodes, kv]

    def _report(self) -> list[int]:
        """The fields of ``tandem.engine.vllm_report.Load``, in its order."""
        running, waiting = self.get_request_counts()
        pool = self.kv_cache_manager.block_pool
        pending = context = kv = handoffs = 0
        for request in self.requests.values():
            if request.is_finished():
                handoffs += _is_held(request)
                continue
            done = request.num_computed_tokens
            kv += done
            left = request.num_prompt_tokens - done
            if left > 0 and not (request.kv_transfer_params or {}).get("do_remote_prefill"):
                pending += left
                context += left * done + left * (left - 1) // 2
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # one block is vLLM's null block
        return [self._steps, running, waiting, pending, context, used, kv, handoffs]


def _is_held(request: Request) -> bool:
    return bool(request.is_finished() and (request.kv_transfer_params or {}).get("do_remote_decode"))


class StepScheduler(_StepAccounting, Scheduler):
    pass


class AsyncStepScheduler(_StepAccounting, AsyncScheduler):
    pass


# -- connector ---------------------------------------------------------------------------------------------------------


class NixlConnector(NixlPullConnector):
    """Bears vLLM's own name, by which vLLM recognises what needs NIXL's special care."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = _LeaseScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = _LeaseWorker(vllm_config, self.engine_id, kv_cache_config)

    def take_transfers(self) -> list[tuple[str, int, float]]:
        """(request id, tokens pulled, seconds from allocation to arrival) of each pull that has ended meanwhile."""
        assert self.connector_scheduler is not None
        done: list[tuple[str, int, float]] = self.connector_scheduler.transfers
        self.connector_scheduler.transfers = []
        return done

    def release(self, request_id: str) -> None:
        assert self.connector_scheduler is not None
        self.connector_scheduler.released.add(request_id)


class _LeaseScheduler(NixlPullConnectorScheduler):
    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._heartbeat_interval = self._kv_lease_duration / 6  # vLLM's // makes a short lease's 0: one every step
        self._pulling: dict[str, tuple[int, float]] = {}
        self.transfers: list[tuple[str, int, float]] = []
        self.released: set[str] = set()

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> NixlConnectorMetadata:
        meta = super().build_connector_meta(scheduler_output)
        meta.released, self.released = self.released, set()
        return meta

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens > 0:
            self._pulling[request.request_id] = (num_external_tokens, time.monotonic())

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        failed = connector_output.failed_recving or ()
        for request_id in connector_output.finished_recving or ():
            tokens, began = self._pulling.pop(request_id, (0, 0.0))
            if tokens and request_id not in failed:
                self.transfers.append((request_id, tokens, time.monotonic() - began))

    def request_finished(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        lease_until = time.monotonic() + self._kv_lease_duration  # before vLLM starts counting
        held, params = super().request_finished(request, block_ids)
        if held and params is not None:
            params["lease_until"] = lease_until
            params["num_blocks"] = self.vllm_config.cache_config.num_gpu_blocks
        return held, params


class _LeaseWorker(NixlPullConnectorWorker):
    """The consumer's deadline comes in vLLM's ``remote_blocks_expiry_time`` (which it only uses for D-to-P reads), in
    this machine's monotonic time. The producer's releases come with the step's metadata."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._released: dict[str, float] = {}  # oldest first
        self._to_free: set[str] = set()

    # consumer

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        if self._too_late(meta):
            self._give_up(req_id)
        else:
            super()._read_blocks_for_req(req_id, meta)

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done, failed = super()._pop_done_transfers(transfers)
        if transfers is self._recving_transfers:
            for req_id in done - failed:
                if (meta := self._recving_metadata.get(req_id)) is not None and self._too_late(meta):
                    self.xfer_stats.record_kv_expired_req()
                    failed.add(req_id)
        return done, failed

    def _too_late(self, meta: ReqMeta) -> bool:
        deadline = None if meta.remote is None else meta.remote.blocks_expiry_time
        return deadline is not None and any(meta.local_block_ids) and time.monotonic() > deadline

    def _give_up(self, req_id: str) -> None:
        self.xfer_stats.record_kv_expired_req()
        self._handle_failed_transfer(req_id, None, self._recv_failures, record_failed_transfer=False)

    # producer

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        super().start_load_kv(metadata)
        # What is not in _reqs_to_process was reported as read or expired; the core tells some aborts twice.
        for request_id in (metadata.released & self._reqs_to_process) - self._released.keys():
            # It stays in _reqs_to_process, so that the notification of a reader that had just begun is not taken for
            # a read past its lease.
            self._released[request_id] = time.monotonic()
            self._reqs_to_send.pop(request_id, None)
            self._to_free.add(request_id)

    def _get_new_notifs(self) -> set[str]:
        done: set[str] = super()._get_new_notifs()
        for request_id in done & self._released.keys():
            del self._released[request_id]
            done.discard(request_id)
        while self._released:
            oldest = next(iter(self._released))
            if time.monotonic() - self._released[oldest] < _REMEMBER_RELEASED_S:
                break
            del self._released[oldest]
            self._reqs_to_process.discard(oldest)
        return done

    def get_transfer_results(self) -> KVConnectorTransferResults:
        results = super().get_transfer_results()
        results.finished_sending.update(self._to_free)
        self._to_free.clear()
        return results


class WorkerExtension:
    """Methods that vLLM adds to its worker; reached by ``collective_rpc``."""

    model_runner: Any

    def describe_kv(self) -> dict[str, Any]:
        """Of this rank: bytes of one block (all layers), how many there are, and how they are laid out."""
        runner = self.model_runner
        config = runner.kv_cache_config
        size = sum(tensor.size for tensor in config.kv_cache_tensors)
        return {
            "block_bytes": size // config.num_blocks,
            "num_blocks": config.num_blocks,
            "layout": runner.vllm_config.cache_config.kv_cache_layout or "",
        }
