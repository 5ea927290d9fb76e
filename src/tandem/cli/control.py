"""What an operator's commands have in common: which routers there are, which of them leads, and what went wrong."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import grpc

from tandem.cli import rundir
from tandem.errors import ConfigError, NoLeader, UnknownModel
from tandem.v1 import router_pb2, router_pb2_grpc

CALL_S = 5.0


def add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", default="", metavar="NAME", help="which cluster, where several run here")
    parser.add_argument("--router", metavar="HOST:PORT", help="ask this router instead of a cluster of this machine")


def routers(args: argparse.Namespace) -> list[str]:
    """ConfigError if no cluster is up."""
    return [args.router] if args.router else list(rundir.find_cluster(args.cluster).routers)


def chosen_model(wanted: str, addresses: Sequence[str]) -> str:
    """``wanted``, or the only model that there is. UnknownModel names what there is; NoLeader if no router answers."""
    names = list(dict.fromkeys(leader.model for leader in _leaders(addresses)))
    if wanted in names or (not wanted and len(names) == 1):
        return wanted or names[0]
    if wanted:
        raise UnknownModel(f"no model {wanted!r}; there is: {', '.join(names)}")
    raise ConfigError(f"several models are served; choose one by --model: {', '.join(names)}", param="model")


def leader_of(model: str, addresses: Sequence[str]) -> str:
    """Address of the router that leads; the first that answers if none says so. NoLeader if none answers."""
    answering = []
    for address in addresses:
        for leader in _leaders_at(address):
            if leader.model == model:
                answering.append(address)
                if leader.self:
                    return address
    if not answering:
        raise NoLeader(f"no router of model {model} answers at {', '.join(addresses) or '(none known)'}")
    return answering[0]


def _leaders(addresses: Sequence[str]) -> list[router_pb2.Leader]:
    found = [leader for address in addresses for leader in _leaders_at(address)]
    if not found:
        raise NoLeader(f"no router answers at {', '.join(addresses) or '(none known)'}")
    return found


def _leaders_at(address: str) -> list[router_pb2.Leader]:
    with grpc.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            return list(stub.GetLeaders(router_pb2.GetLeadersRequest(), timeout=CALL_S).leaders)
        except grpc.RpcError:
            return []


def workers(address: str, model: str = "") -> list[router_pb2.WorkerState]:
    """As the router at ``address`` sees them. NoLeader if it does not answer."""
    with grpc.insecure_channel(address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            return list(stub.ListWorkers(router_pb2.ListWorkersRequest(model=model), timeout=CALL_S).workers)
        except grpc.RpcError as error:
            raise NoLeader(f"the router at {address} does not answer: {said(error)}") from None


def said(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
