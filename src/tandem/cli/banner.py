"""What `tandem up` shows when the cluster is ready: where it is, and three ways to talk to it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from tandem.adapters.deployment import Deployment, Model
from tandem.cli.rundir import ClusterState

_EXAMPLE = Path("examples/grpc_client.py")
_QUESTION = "What is the capital of France?"


def describe(deployment: Deployment) -> str:
    """`SmolLM2-135M-Instruct (1 prefill + 1 decode, vllm)`, for each model."""
    return ", ".join(_describe(model) for model in deployment.models)


def _describe(model: Model) -> str:
    workers = " + ".join(f"{pool.replicas} {pool.pool_name}" for pool in model.pools)
    engines = "/".join(sorted({pool.engine for pool in model.pools}))
    return f"{model.name} ({workers}, {engines})"


def banner(deployment: Deployment, state: ClusterState, took_s: float) -> str:
    model, http, grpc = deployment.models[0].name, state.http[0], state.grpc[0]
    chat = {"model": model, "messages": [{"role": "user", "content": _QUESTION}]}
    # A model as small as the built-in one is at its best without chance.
    streamed = json.dumps({**chat, "temperature": 0, "stream": True})
    greedy = json.dumps({**chat, "options": {"temperature": 0}})
    python = os.path.relpath(sys.executable) if _is_local(sys.executable) else sys.executable
    lines = [
        "",
        f"Tandem is ready after {took_s:.1f} s: {describe(deployment)}",
        "",
        f"  HTTP   {'  '.join(f'{url}/v1' for url in state.http)}",
        f"  gRPC   {'  '.join(state.grpc)}",
        *([f"  page   {state.console}   (workers, load, traces, live)"] if state.console else []),
        "",
        f"  curl -N {http}/v1/chat/completions -H 'content-type: application/json' -d '{streamed}'",
        f"  grpcurl -plaintext -d '{greedy}' {grpc} tandem.v1.InferenceService/Chat",
    ]
    if _EXAMPLE.is_file():
        lines.append(f"  {python} {_EXAMPLE} '{_QUESTION}' --address {grpc}")
    lines += [f"  {_tandem()} chat", "", "Ctrl-C stops it.", ""]
    return "\n".join(lines)


def _is_local(path: str) -> bool:
    return Path(path).is_relative_to(Path.cwd())


def _tandem() -> str:
    """How this program is called from here."""
    ours = Path(sys.executable).with_name("tandem")
    found = shutil.which("tandem")
    if found is not None and ours.exists() and Path(found).samefile(ours):
        return "tandem"
    return os.path.relpath(ours) if _is_local(str(ours)) else str(ours)
