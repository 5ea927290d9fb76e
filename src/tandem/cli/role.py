"""`tandem role`: gives a worker another role while it runs. What it has begun, it ends; the engine is not restarted."""

from __future__ import annotations

import argparse
from time import sleep

import grpc

from tandem.adapters.clock import monotonic
from tandem.cli import control
from tandem.core.types import Role
from tandem.errors import ConfigError, InvalidRequest, Lost
from tandem.v1 import worker_pb2, worker_pb2_grpc
from tandem.wire import codec

#: Until the routers have seen it.
_SEEN_S = 10.0
#: Whoever decodes also computes prompts where that is best, for itself and (policy.flexible) for others.
_ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "both": Role.DECODE}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("worker", help="its name, as `tandem status` shows it")
    parser.add_argument("role", choices=list(_ROLES), help="from now on; both = decode: who decodes, computes, too")
    control.add_where(parser)


def run(args: argparse.Namespace) -> int:
    """Returns when the leading router gives the worker work of its new role."""
    addresses = control.routers(args)
    known = {state.info.ref.id: state.info for address in addresses for state in control.workers(address)}
    info = known.get(args.worker)
    if info is None:
        raise ConfigError(f"no worker {args.worker!r}; there is: {', '.join(sorted(known)) or 'none'}", param="worker")
    role = _ROLES[args.role]
    previous = _set_role(info.ref.grpc_address, role)
    if previous is role:
        print(f"{args.worker} was {role.value} already")
        return 0
    router = control.leader_of(info.model, addresses)
    deadline = monotonic() + _SEEN_S
    while not _seen(router, info.model, args.worker, role):
        if monotonic() > deadline:
            raise Lost(f"{args.worker} is {role.value} now, but the router at {router} has not noticed")
        sleep(0.05)
    print(f"{args.worker}: {previous.value} -> {role.value}")
    _warn_if_nobody_decodes(router, info.model)
    return 0


def _set_role(address: str, role: Role) -> Role:
    with grpc.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        try:
            answer = stub.SetRole(worker_pb2.SetRoleRequest(role=codec.role_to_wire(role)), timeout=control.CALL_S)
        except grpc.RpcError as error:
            raise InvalidRequest(f"the worker at {address}: {control.said(error)}") from None
    return codec.role_from_wire(answer.previous)


def _seen(router: str, model: str, worker: str, role: Role) -> bool:
    wanted = codec.role_to_wire(role)
    return any(s.info.ref.id == worker and s.info.role == wanted for s in control.workers(router, model))


def _warn_if_nobody_decodes(router: str, model: str) -> None:
    decode = codec.role_to_wire(Role.DECODE)
    if not any(state.info.role == decode for state in control.workers(router, model)):
        print(f"warning: nobody decodes for {model} now; its requests wait until somebody does")
