"""The parts of the vLLM adapter that need no vLLM: options, the core's reports, KV events."""

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandem.core.types import StepTiming
from tandem.engine.protocol import (
    AllBlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineConfig,
    EventsMissed,
    KvEvent,
)
from tandem.engine.vllm_options import VllmOptions, engine_args, environment, kv_transfer_args
from tandem.engine.vllm_report import CoreReports
from tandem.errors import ConfigError


def config(**args: object) -> EngineConfig:
    return EngineConfig(
        engine="vllm", model_path="/m", served_model="m", worker_id="w", run_dir="/r", disaggregated=True,
        max_model_len=4096, block_size=32, dtype="auto", kv_lease_s=30.0, kv_host="127.0.0.1", kv_port=0, args=args,
    )  # fmt: skip


# -- options ---


def test_a_users_arguments_win_and_the_adapters_own_are_kept_apart() -> None:
    given = config(max_num_batched_tokens=64, tensor_parallel_size=2, ucx_tls="tcp")
    options, own = VllmOptions.split(given.args)
    assert options.ucx_tls == "tcp"
    args = engine_args(given, own, cpu=True, parent_pid=7)
    assert (args["max_num_batched_tokens"], args["tensor_parallel_size"]) == (64, 2)
    assert "ucx_tls" not in args
    assert args["additional_config"] == {"parent_pid": 7}


def test_cpu_settings_only_on_a_cpu() -> None:
    cpu, gpu = (engine_args(config(), {}, cpu=cpu, parent_pid=1) for cpu in (True, False))
    assert cpu["enforce_eager"] and "distributed_executor_backend" in cpu
    assert not {"enforce_eager", "distributed_executor_backend", "kv_cache_memory_bytes", "max_num_seqs"} & gpu.keys()
    assert "kv_buffer_device" not in kv_transfer_args(config(), "e", cpu=False)


def test_auto_is_float32_where_bfloat16_is_slow_and_a_given_type_stands() -> None:
    given = dataclasses.replace(config(), dtype="bfloat16")
    for asked, slow, expected, kv_mib in (
        (config(), False, "auto", 512),
        (config(), True, "float32", 1024),
        (given, True, "bfloat16", 512),
    ):
        args = engine_args(asked, {}, cpu=True, parent_pid=1, slow_bf16=slow)
        assert (args["dtype"], args["kv_cache_memory_bytes"] >> 20) == (expected, kv_mib)


def test_a_block_size_that_the_cpu_kernel_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="multiple of 32"):
        engine_args(config(), {"block_size": 16}, cpu=True, parent_pid=1)


def test_the_kv_plane_stays_on_loopback_when_it_is_told_so() -> None:
    required, defaults = environment(config(), VllmOptions(), 5600)
    assert required == {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600"}
    assert defaults["UCX_NET_DEVICES"] == "lo"


def test_the_kv_plane_keeps_to_its_interface_unless_rdma_may_choose() -> None:
    elsewhere = dataclasses.replace(config(), kv_host="192.0.2.7")
    _, defaults = environment(elsewhere, VllmOptions(ucx_tls="self,tcp"), 5600, kv_device="eth1")
    assert defaults["UCX_NET_DEVICES"] == "eth1"
    for tls in ("all", "rc,cuda_copy"):
        _, defaults = environment(elsewhere, VllmOptions(ucx_tls=tls), 5600, kv_device="eth1")
        assert "UCX_NET_DEVICES" not in defaults


def test_a_wrong_start_method_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="start_method"):
        VllmOptions.split({"start_method": "thread"})


# -- reports ---


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def report(**fields: Any) -> dict[str, Any]:
    payload = {"load": [0] * 8, "accepted": [], "transfers": [], "step": None}
    return {"tandem": payload | fields}


def test_what_the_core_has_not_taken_yet_counts_as_waiting() -> None:
    reports = CoreReports(Clock(), "tandem")
    reports.submitted("a", 10)
    reports.submitted("b", 100)
    reports.record(report(load=[1, 1, 0, 6, 30, 3, 4, 0], accepted=["a"]), 0)
    stats = reports.stats()
    assert (stats.running_requests, stats.waiting_requests) == (1, 1)
    assert stats.pending_prefill_tokens == 106
    assert stats.pending_prefill_context_tokens == 30 + 99 * 100 // 2
    reports.finished("b")
    assert reports.stats().waiting_requests == 0


def test_silence_counts_only_with_work_in_flight() -> None:
    clock = Clock()
    reports = CoreReports(clock, "tandem")
    clock.now = 200.0
    assert reports.stats().last_step_age_s == 0
    reports.submitted("a", 1)
    clock.now = 203.0
    assert reports.stats().last_step_age_s == 3
    reports.record(report(), 0)
    assert reports.stats().last_step_age_s == 0


def test_counters_and_transfers() -> None:
    reports = CoreReports(Clock(), "tandem")
    stats = report(transfers=[["a", 64, 0.5]], step=[0.25, 512, 1000, 3, 77]) | {
        "num_notifications_after_expiry": [1, 1]
    }
    reports.record(stats, 2)
    assert "tandem" not in stats  # the loggers after this one do not know it
    reports.record(None, 1)
    assert (reports.stats().reads_after_expiry, reports.stats().preemptions) == (2, 3)
    assert reports.take_transfer("a") == (64, 0.5, 100.0)
    assert reports.take_transfer("a") is None
    assert reports.take_step_timings() == [StepTiming(0.25, 512, 1000, 3, 77)]
    assert reports.take_step_timings() == []


# -- events ---

zmq = pytest.importorskip("zmq")


def stored(hashes: list[int], parent: int | None, **more: Any) -> dict[str, Any]:
    return {
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": [1] * 32 * len(hashes),
        "block_size": 32, "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0,
    } | more  # fmt: skip


def payload(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), 0])


def test_events_are_decoded_and_other_groups_left_out() -> None:
    from tandem.engine.vllm_events import decode_events

    events = decode_events(
        payload(
            stored([1, 2], None, extra_keys=[["salt"], None]),
            stored([3], 2, lora_name="l", extra_keys=[["l"]]),
            stored([4], None, lora_name="l", extra_keys=[["l", "salt"]]),
            stored([5], None, group_idx=1),
            stored([6], None, medium="CPU"),
            {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU", "group_idx": 0},
            {"type": "BlockRemoved", "block_hashes": [5], "medium": "GPU", "group_idx": 1},
            {"type": "AllBlocksCleared"},
        ),
        group=0,
    )
    assert events == [
        BlocksStored([1, 2], None, [1] * 64, "", "salt"),
        BlocksStored([3], 2, [1] * 32, "l", ""),
        BlocksStored([4], None, [1] * 32, "l", "salt"),
        BlocksRemoved([1]),
        AllBlocksCleared(),
    ]


class Publisher:
    """Speaks vLLM's side: numbered messages, and replay of what it still has."""

    def __init__(self, folder: Path) -> None:
        import zmq.asyncio

        self.endpoint, self.replay = f"ipc://{folder}/kv", f"ipc://{folder}/replay"
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.bind(self.endpoint)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(self.replay)
        self.kept: dict[int, bytes] = {}
        self._task = asyncio.create_task(self._serve())

    async def subscribed(self) -> None:
        await asyncio.wait_for(self._pub.recv(), 10)

    async def publish(self, number: int, *events: dict[str, Any]) -> None:
        await self._pub.send_multipart([b"", number.to_bytes(8, "big"), payload(*events)])

    async def _serve(self) -> None:
        while True:
            client, _, first = await self._router.recv_multipart()
            for number, kept in sorted(self.kept.items()):
                if number >= int.from_bytes(first, "big"):
                    await self._router.send_multipart([client, b"", b"", number.to_bytes(8, "big"), kept])
            await self._router.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    async def close(self) -> None:
        self._task.cancel()
        self._context.destroy(linger=0)


async def test_a_gap_is_replayed_or_said(tmp_path: Path) -> None:
    from tandem.engine.vllm_events import KvEventStream

    got: list[KvEvent] = []
    more = asyncio.Event()

    def on_events(events: Sequence[KvEvent]) -> None:
        got.extend(events)
        more.set()

    async def have(count: int) -> None:
        async with asyncio.timeout(20):
            while len(got) < count:
                more.clear()
                await more.wait()

    publisher = Publisher(tmp_path)
    stream = KvEventStream(publisher.endpoint, publisher.replay, 0, on_events)
    running = asyncio.create_task(stream.run())
    await publisher.subscribed()
    publisher.kept = {n: payload(stored([n], None)) for n in (1, 2, 6, 7)}
    await publisher.publish(0, stored([0], None))
    await have(1)
    await publisher.publish(3, stored([3], None))  # 1 and 2 are replayed
    await have(4)
    await publisher.publish(8, stored([8], None))  # of 4 to 7, the publisher has 6 and 7 only
    await have(8)
    await publisher.publish(10, stored([10], None))  # 9 is gone
    await have(10)
    running.cancel()
    await publisher.close()
    seen = [event.block_hashes[0] if isinstance(event, BlocksStored) else event for event in got]
    assert seen == [0, 1, 2, 3, EventsMissed(), 6, 7, 8, EventsMissed(), 10]
