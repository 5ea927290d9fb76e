"""`tandem status`: processes, leaders, queue, workers with their load and bookings of a running cluster."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToDict

from tandem.cli import rundir
from tandem.cli.rundir import ClusterState
from tandem.cli.terminal import complain
from tandem.errors import NoLeader
from tandem.v1 import router_pb2, router_pb2_grpc, types_pb2

_CALL_S = 3.0
_WORKER_COLUMNS = (
    "worker", "model", "role", "state", "running", "waiting", "prefill tokens", "KV blocks", "handoffs", "booked",
    "booked KV",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RouterAnswer:
    """What one router knows. ``accounting`` by model: what waits there, and what it has booked on each worker."""

    workers: Sequence[router_pb2.WorkerState]
    leaders: Sequence[router_pb2.Leader]
    accounting: Mapping[str, router_pb2.GetAccountingResponse] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cluster", default="", metavar="NAME", help="which cluster, where several run on this machine")
    add("--router", metavar="HOST:PORT", help="ask this router instead of a cluster of this machine")
    add("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    state = None if args.router else rundir.find_cluster(args.cluster)
    if state is not None and not state.ready and not args.json:
        complain("the cluster is still starting, or stopping")
    routers = [args.router] if args.router else list(state.routers if state else ())
    answer = asyncio.run(ask(routers))
    print(as_json(state, answer) if args.json else "\n".join(as_text(state, answer)))
    return 0


async def ask(routers: Sequence[str]) -> RouterAnswer:
    """What the first router that answers knows; a leader, where one says that it is. NoLeader if none answers."""
    answers = [answer for router in routers if (answer := await _ask(router)) is not None]
    if not answers:
        raise NoLeader(f"no router answers at {', '.join(routers) or '(none known)'}")
    return max(answers, key=lambda answer: sum(leader.self for leader in answer.leaders))


async def _ask(router: str) -> RouterAnswer | None:
    async with grpc.aio.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            workers = await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=_CALL_S)
            leaders = (await stub.GetLeaders(router_pb2.GetLeadersRequest(), timeout=_CALL_S)).leaders
            accounting = {
                leader.model: await stub.GetAccounting(
                    router_pb2.GetAccountingRequest(model=leader.model), timeout=_CALL_S
                )
                for leader in leaders
            }
        except grpc.aio.AioRpcError:
            return None
    return RouterAnswer(list(workers.workers), list(leaders), accounting)


def as_json(state: ClusterState | None, answer: RouterAnswer) -> str:
    data = {
        "cluster": json.loads(rundir.to_json(state)) if state else None,
        "leaders": [_plain(leader) for leader in answer.leaders],
        "workers": [_plain(worker) for worker in answer.workers],
        "accounting": {model: _plain(accounting) for model, accounting in answer.accounting.items()},
    }
    return json.dumps(data, indent=1)


def _plain(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def as_text(state: ClusterState | None, answer: RouterAnswer) -> list[str]:
    lines = []
    if state is not None:
        lines.append(f"cluster {state.cluster}: {' '.join(state.http)}, gRPC {' '.join(state.grpc)}")
        if state.console:
            lines.append(f"console {state.console}")
        rows = [
            (p.name, p.kind, p.state, p.pid or "-", p.restarts, p.grpc or "-", p.metrics or "-")
            for p in state.processes
        ]
        lines += ["", *table(("process", "kind", "state", "pid", "restarts", "gRPC", "metrics"), rows)]
    header = ("model", "leader", "epoch", "placed", "waiting", "tokens waiting", "oldest wait")
    lines += ["", *table(header, [_model_row(leader, answer) for leader in answer.leaders])]
    lines += _queue(answer)
    lines += ["", *table(_WORKER_COLUMNS, [_worker_row(worker, answer) for worker in answer.workers])]
    return lines


def _model_row(leader: router_pb2.Leader, answer: RouterAnswer) -> tuple[object, ...]:
    books = answer.accounting.get(leader.model, router_pb2.GetAccountingResponse())
    wait = f"{books.oldest_wait_s:.1f} s" if books.queued else "-"
    return leader.model, leader.router or "none", leader.epoch, books.in_flight, books.queued, books.queued_tokens, wait


def _queue(answer: RouterAnswer) -> list[str]:
    """Who waits, where anybody does."""
    rows = [
        (model, kind, depth.name, depth.requests, depth.tokens)
        for model, books in answer.accounting.items()
        for kind, depths in (("class", books.queue_by_class), ("tenant", books.queue_by_tenant))
        for depth in depths
        if depth.requests
    ]
    return ["", *table(("model", "waiting by", "name", "requests", "tokens"), rows)] if rows else []


def _worker_row(worker: router_pb2.WorkerState, answer: RouterAnswer) -> tuple[object, ...]:
    info, load = worker.info, worker.load
    books = answer.accounting.get(info.model, router_pb2.GetAccountingResponse())
    booked = next((b for b in books.workers if b.worker == info.ref.id), router_pb2.Booked())
    return (
        info.ref.id,
        info.model,
        types_pb2.Role.Name(load.role or info.role).removeprefix("ROLE_").lower(),
        worker.liveness,
        load.running_requests,
        load.waiting_requests,
        load.pending_prefill_tokens,
        f"{load.kv_blocks_used}/{info.kv_blocks_total}",
        load.open_handoffs,
        booked.in_flight,
        booked.kv_blocks_in_use,
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Columns as wide as they need to be; numbers to the right."""
    rows = [tuple(row) for row in rows]
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    right = [bool(rows) and all(isinstance(row[i], int) or row[i] == "-" for row in rows) for i in range(len(header))]

    def line(cells: Sequence[object]) -> str:
        parts = [str(c).rjust(w) if r else str(c).ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return [line(header), *(line(row) for row in rows)] if rows else [line(header), "(none)"]
