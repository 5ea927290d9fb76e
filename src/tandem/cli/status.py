"""`tandem status`: processes, workers, load and leaders of a running cluster."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable, Sequence
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToDict

from tandem.cli import rundir
from tandem.cli.rundir import ClusterState
from tandem.cli.terminal import complain
from tandem.errors import NoLeader
from tandem.v1 import router_pb2, router_pb2_grpc, types_pb2

_CALL_S = 3.0
_WORKER_COLUMNS = ("worker", "model", "role", "state", "running", "waiting", "prefill tokens", "KV blocks", "handoffs")


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
    workers, leaders = asyncio.run(ask(routers))
    if args.json:
        print(as_json(state, workers, leaders))
    else:
        print("\n".join(as_text(state, workers, leaders)))
    return 0


async def ask(
    routers: Sequence[str],
) -> tuple[list[router_pb2.WorkerState], list[router_pb2.Leader]]:
    """What the first router that answers knows; a leader, where one says that it is. NoLeader if none answers."""
    answers = [answer for router in routers if (answer := await _ask(router)) is not None]
    if not answers:
        raise NoLeader(f"no router answers at {', '.join(routers) or '(none known)'}")
    best = max(answers, key=lambda answer: sum(leader.self for leader in answer[1]))
    return best


async def _ask(router: str) -> tuple[list[router_pb2.WorkerState], list[router_pb2.Leader]] | None:
    async with grpc.aio.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            workers = await stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=_CALL_S)
            leaders = await stub.GetLeaders(router_pb2.GetLeadersRequest(), timeout=_CALL_S)
        except grpc.aio.AioRpcError:
            return None
    return list(workers.workers), list(leaders.leaders)


def as_json(
    state: ClusterState | None, workers: Iterable[router_pb2.WorkerState], leaders: Iterable[router_pb2.Leader]
) -> str:
    data = {
        "cluster": json.loads(rundir.to_json(state)) if state else None,
        "leaders": [_plain(leader) for leader in leaders],
        "workers": [_plain(worker) for worker in workers],
    }
    return json.dumps(data, indent=1)


def _plain(message: Any) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def as_text(
    state: ClusterState | None, workers: Iterable[router_pb2.WorkerState], leaders: Iterable[router_pb2.Leader]
) -> list[str]:
    lines = []
    if state is not None:
        lines.append(f"cluster {state.cluster}: {' '.join(state.http)}, gRPC {' '.join(state.grpc)}")
        rows = [
            (p.name, p.kind, p.state, p.pid or "-", p.restarts, p.grpc or "-", p.metrics or "-")
            for p in state.processes
        ]
        lines += ["", *table(("process", "kind", "state", "pid", "restarts", "gRPC", "metrics"), rows)]
    lines += ["", *table(("model", "leader", "epoch"), [(x.model, x.router or "none", x.epoch) for x in leaders])]
    lines += ["", *table(_WORKER_COLUMNS, [_worker_row(worker) for worker in workers])]
    return lines


def _worker_row(worker: router_pb2.WorkerState) -> tuple[object, ...]:
    info, load = worker.info, worker.load
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
