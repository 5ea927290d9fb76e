"""A cluster under test that is to be harmed: how it is deployed, what its processes say about themselves."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import grpc
import psutil

from tandem.models.prepare import prepare_smollm2
from tandem.v1 import router_pb2, router_pb2_grpc, worker_pb2
from tests.harness.answers import BLOCK, MODEL, VOCABULARY
from tests.harness.client import describe
from tests.harness.cluster import Cluster, wait_for
from tests.harness.load import Address

SETTLE_S = 30.0
SIM = {"step_s": 0.02, "token_range": [VOCABULARY.start, VOCABULARY.stop], "max_num_seqs": 128}
#: In float32, where greedy answers do not depend on what else is in the batch (but for ties).
VLLM = {"kv_cache_memory_bytes": 512 << 20, "max_num_batched_tokens": 512, "max_num_seqs": 64}


def deployment(
    *, engine: str = "sim", routers: int = 1, decode: int = 2, frontends: int = 1, step_s: float = SIM["step_s"]
) -> dict[str, Any]:
    """Every prompt is prefilled remotely where that is possible, so that every request has a handoff."""
    args = {**SIM, "step_s": step_s} if engine == "sim" else VLLM
    real = {"path": str(prepare_smollm2()), "dtype": "float32"} if engine == "vllm" else {"path": MODEL}
    return {
        "routers": routers,
        "frontends": frontends,
        "policy": {"local_prefill": False},
        "console": {"enabled": False},
        "models": [
            {
                "name": MODEL,
                **real,
                "max_model_len": 4096,
                "block_size": BLOCK,
                "kv_lease_s": 6.0,
                "pools": [
                    {"role": "prefill", "replicas": 1, "engine": engine, "engine_args": args},
                    {"role": "decode", "replicas": decode, "engine": engine, "engine_args": args},
                ],
            }
        ],
    }


class Site(Cluster):
    """A cluster, and what its processes say about themselves."""

    @property
    def addresses(self) -> list[Address]:
        """Of its frontends."""
        state = self.state()
        return [Address(grpc, http) for grpc, http in zip(state["grpc"], state["http"], strict=True)]

    def workers(self) -> list[dict[str, Any]]:
        return [*self.processes("prefill"), *self.processes("decode")]

    def loads(self) -> dict[str, worker_pb2.DescribeResponse]:
        """What each worker reports, by its name. grpc.RpcError where one does not answer."""
        return {worker["name"]: describe(worker["grpc"]) for worker in self.workers()}

    def left(self) -> list[str]:
        """What any worker or the leading router still holds; what cannot be asked counts as well."""
        found = []
        for worker in self.workers():
            try:
                load = describe(worker["grpc"]).load
            except grpc.RpcError as error:
                found.append(f"{worker['name']} does not answer: {error}")
                continue
            numbers = _numbers(load)
            if any(numbers.values()):
                found.append(f"{worker['name']}: {numbers}")
        for router in self.processes("router"):
            try:
                accounting = accounting_of(router["grpc"])
            except grpc.RpcError as error:
                found.append(f"{router['name']} does not answer: {error}")
                continue
            kept = {"queued": accounting.queued, "in_flight": accounting.in_flight, "kept": accounting.kept}
            booked = {b.worker: b.kv_blocks_in_use for b in accounting.workers if b.in_flight or b.kv_blocks_in_use}
            if any(kept.values()) or booked:
                found.append(f"{router['name']}: {kept} {booked}")
            if len(accounting.workers) != len(self.workers()):
                found.append(f"{router['name']} knows {[b.worker for b in accounting.workers]}")
        return found

    def settled(self, timeout_s: float = SETTLE_S) -> None:
        """Every process runs, and nothing of any request is left anywhere."""
        wait_for(self.all_ready, timeout_s, "every process ready")
        left: list[str] = []

        def nothing() -> bool:
            left[:] = self.left()
            return not left

        try:
            wait_for(nothing, timeout_s, "nothing left behind")
        except AssertionError as error:
            raise AssertionError(f"{error}: {left}") from None

    def declared_dead(self, since: int) -> list[str]:
        """Lines of the log, from a place in it on, in which a router gave a worker up."""
        return re.findall(r"fleet: worker \S+ is gone.*", self.log()[since:])

    def all_ready(self) -> bool:
        processes = self.state().get("processes", [])
        return bool(processes) and all(process["state"] == "ready" for process in processes)

    def name_of_leader(self) -> str:
        """Of the routers, the one that leads; "" when none does."""
        for router in self.processes("router"):
            with suppress(grpc.RpcError), grpc.insecure_channel(router["grpc"]) as channel:
                stub = router_pb2_grpc.RouterServiceStub(channel)
                for leader in stub.GetLeaders(router_pb2.GetLeadersRequest(), timeout=2).leaders:
                    if leader.self:
                        return str(router["name"])
        return ""

    def pid_of(self, name: str) -> int:
        return next(int(p["pid"]) for p in self.state()["processes"] if p["name"] == name)

    def signal_whole(self, name: str, number: signal.Signals) -> int:
        """To a process and to what it started: a worker's engine has a process of its own. Returns its pid."""
        pid = self.pid_of(name)
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            children = psutil.Process(pid).children(recursive=True)
            os.kill(pid, number)
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)
        return pid

    def resume_all(self, names: Iterable[str] = ()) -> None:
        for process in self.state().get("processes", []):
            if not names or process["name"] in names:
                self.signal_whole(process["name"], signal.SIGCONT)


def _numbers(load: worker_pb2.DescribeResponse) -> dict[str, int]:
    names = ("running_requests", "waiting_requests", "open_handoffs", "kv_blocks_used")
    return {name: getattr(load, name) for name in names}


def accounting_of(router: str) -> router_pb2.GetAccountingResponse:
    with grpc.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        return stub.GetAccounting(router_pb2.GetAccountingRequest(model=MODEL), timeout=5)
