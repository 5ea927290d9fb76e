"""`tandem policy`: what the router decides by, and (``--apply FILE``) a running local cluster's new policy.

Policy, classes and tenants of a deployment file take effect while the cluster runs: routers and frontends read the
file again on SIGHUP. ``--apply`` does that for a cluster of this machine; elsewhere the file is exchanged and the
processes are sent the signal by whoever runs them. Everything else in the file needs a restart.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from time import sleep
from typing import Any

import grpc

from tandem.adapters import deployment as deployment_file
from tandem.adapters.clock import monotonic
from tandem.adapters.deployment import Deployment
from tandem.cli import control, rundir
from tandem.cli.status import table
from tandem.core.policy import Policy, policy_from
from tandem.errors import ConfigError, Lost, NoLeader
from tandem.v1 import router_pb2, router_pb2_grpc

#: Parts of the file that a running cluster takes.
_LIVE = ("policy", "classes", "tenants")
_TAKEN_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--apply", metavar="FILE", help="give the running cluster the policy, classes and tenants of this file")
    add("--model", default="", help="default: the only one")
    add("--json", action="store_true", help="for programs")
    control.add_where(parser)


def run(args: argparse.Namespace) -> int:
    if args.apply:
        if args.router:
            raise ConfigError("--apply is for a cluster of this machine, not for --router", param="apply")
        _apply(args)
    addresses = control.routers(args)
    model = control.chosen_model(args.model, addresses)
    policy, classes, tenants = shown(control.leader_of(model, addresses), model)
    if args.json:
        print(json.dumps({"model": model, "policy": policy, "classes": classes, "tenants": tenants}, indent=1))
    else:
        print("\n".join(as_text(model, policy, classes, tenants)))
    return 0


_Rows = list[dict[str, Any]]


def shown(router: str, model: str) -> tuple[dict[str, Any], _Rows, _Rows]:
    """(policy, classes, tenants) by which this router decides. NoLeader if it does not answer."""
    with grpc.insecure_channel(router) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        try:
            answer = stub.GetPolicy(router_pb2.GetPolicyRequest(model=model), timeout=control.CALL_S)
        except grpc.RpcError as error:
            raise NoLeader(f"the router at {router} does not answer: {control.said(error)}") from None
    return (
        json.loads(answer.policy_json),
        json.loads(answer.classes_json or "[]"),
        json.loads(answer.tenants_json or "[]"),
    )


def as_text(model: str, policy: Mapping[str, Any], classes: _Rows, tenants: _Rows) -> list[str]:
    meaning = {knob.name: (knob.default, knob.metadata["help"]) for knob in fields(Policy)}
    rows = []
    for name, value in policy.items():
        default, about = meaning.get(name, (value, "(not known to this version)"))
        rows.append((name, str(value), "" if value == default else f"default {default}", about))
    lines = [f"policy of {model}", "", *table(("knob", "value", "", "meaning"), rows)]
    for what, found in (("classes, the default first", classes), ("tenants", tenants)):
        names = list(found[0]) if found else []
        cells = [tuple("-" if row[name] in (None, "") else str(row[name]) for name in names) for row in found]
        lines += ["", what, *(table(names, cells) if found else ["(none declared: one tenant, `default`)"])]
    return lines


# -- a running cluster -------------------------------------------------------------------------------------------------


def _apply(args: argparse.Namespace) -> None:
    """Returns when every router and frontend that runs has been told, and the routers decide by it."""
    wanted = deployment_file.read(args.apply)
    policy_from(wanted.policy)
    state = rundir.find_cluster(args.cluster)
    copy = rundir.deployment_of(state)
    new = _merged(deployment_file.read(copy), wanted)
    fresh = copy.with_name(f".{copy.name}")
    fresh.write_text(new.to_yaml())
    fresh.replace(copy)
    for process in state.processes:
        if process.kind in ("router", "frontend", "console") and process.pid:
            with suppress(ProcessLookupError):  # it restarts, and reads the file then
                os.kill(process.pid, signal.SIGHUP)
    deadline = monotonic() + _TAKEN_S
    policy = json.loads(json.dumps(asdict(policy_from(new.policy))))
    names = [[each.name for each in part] for part in (new.classes, new.tenants)]
    for router in state.routers:
        for model in new.models:
            while not _taken(router, model.name, policy, names):
                if monotonic() > deadline:
                    raise Lost(f"the router at {router} has not taken the new policy; its log says why")
                sleep(0.05)


def _merged(running: Deployment, wanted: Deployment) -> Deployment:
    """The running deployment with the live parts of the other. ConfigError names what else differs."""
    new = running.model_copy(update={name: getattr(wanted, name) for name in _LIVE})
    aside = {"models", "http", "grpc", *_LIVE}  # paths and ports were settled when it started
    other = [name for name in type(wanted).model_fields if name not in aside and _differs(running, wanted, name)]
    if [model.name for model in running.models] != [model.name for model in wanted.models]:
        other.insert(0, "models")
    if other:
        raise ConfigError(f"only {', '.join(_LIVE)} change while a cluster runs, and not: {', '.join(other)}")
    return deployment_file.parse(new.to_yaml())


def _differs(running: Deployment, wanted: Deployment, name: str) -> bool:
    """Parts that the file does not mention stay as they are."""
    return name in wanted.model_fields_set and getattr(running, name) != getattr(wanted, name)


def _taken(router: str, model: str, policy: Mapping[str, Any], names: list[list[str]]) -> bool:
    with suppress(NoLeader):
        found, classes, tenants = shown(router, model)
        return found == policy and [[each["name"] for each in part] for part in (classes, tenants)] == names
    return False
