"""The servers that are compared: Tandem by `tandem up`, and Dynamo by a kit of scripts that installs and starts it.

Both serve SmolLM2's tokenizer in front of engines that compute nothing. A kit is a folder with ``install.sh``, ``up.sh
NAME PORT ROUTER WORKERS MOCKER_ARGS FRONTEND_ARGS`` and ``down.sh NAME``, which keeps its state in ``$PEERS``.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from bench.serve.load import Target
from tandem.adapters.embedded import free_port

MODEL = "SmolLM2-135M-Instruct"
_START_S = 90.0


@dataclass(frozen=True)
class Engines:
    """The engines behind a stack; how each stack is told so is its own matter."""

    name: str
    workers: int = 2
    #: Seconds of every step; None: the timing of Dynamo's mocker (see ``MOCKER``).
    step_s: float | None = 0.0
    kv_blocks: int = 16384
    block_size: int = 64


#: Dynamo 1.6.1's mocker, ms: a prefill of n tokens 16.50 + 0.01518 n + 4.21e-7 n^2, and a decode step
#: 5.74 + 54.01 p - 25.74 p^2, p = share of the KV cache in use. Ours is linear in p: the slope up to p = 1/4.
_PREFILL_MS = (16.50, 0.01518, 2 * 4.21e-7)
_DECODE_MS, _DECODE_SLOPE_MS = 5.74, 54.01 - 25.74 / 4


class Stack(AbstractContextManager["Stack"]):
    """Started on entry, stopped on exit."""

    name: str
    target: Target


@dataclass
class Tandem(Stack):
    engines: Engines
    folder: Path
    name: str = "tandem"
    #: Of the model in the deployment file: "auto" or "hf".
    tokenizer: str = "auto"
    processes: int = 1
    #: Of `tandem up`, beside this process's own.
    env: Mapping[str, str] = field(default_factory=dict)
    console: bool = True
    target: Target = field(init=False)
    _process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir()
        http, key = free_port(), secrets.token_hex(16)
        file = self.folder / "deployment.yaml"
        file.write_text(yaml.safe_dump(self._deployment(http, key)))
        env = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
        env.update(self.env)
        env["XDG_RUNTIME_DIR"] = env["XDG_STATE_HOME"] = str(self.folder)
        command = [sys.executable, "-m", "tandem.cli.main", "up", "-f", str(file)]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        self.target = Target(http, MODEL, self._processes(), [f"Authorization: Bearer {key}"])
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _deployment(self, http: int, key: str) -> dict[str, Any]:
        pool = {
            "role": "aggregated",
            "engine": "sim",
            "replicas": self.engines.workers,
            "engine_args": sim_args(self.engines),
        }
        model: dict[str, Any] = {"name": MODEL, "path": MODEL, "max_model_len": 16384, "pools": [pool]}
        model["block_size"] = self.engines.block_size
        if self.tokenizer != "auto":
            model["tokenizer"] = self.tokenizer
        return {
            "cluster": f"bench-{self.name}",
            "http": {"port": http},
            "grpc": {"port": free_port()},
            "console": {"enabled": self.console},
            "models": [model],
            # As a user would have it: every request is authenticated.
            "tenants": [{"name": "bench", "api_key_sha256": [hashlib.sha256(key.encode()).hexdigest()]}],
        } | ({"processes": self.processes} if self.processes > 1 else {})

    def _wait_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._state().get("ready"):
                return
            time.sleep(0.1)
        raise RuntimeError("Tandem did not start:\n" + (self.folder / "log").read_text(errors="replace")[-3000:])

    def _state(self) -> dict[str, Any]:
        for path in self.folder.glob("tandem/*/state.json"):
            found: dict[str, Any] = json.loads(path.read_bytes())
            return found
        return {}

    def _processes(self) -> Mapping[str, Sequence[int]]:
        groups: dict[str, list[int]] = {}
        for process in self._state()["processes"]:
            kind = "workers" if process["kind"] in ("prefill", "decode") else process["kind"]
            group = process["name"] if kind == "server" else kind
            family = [process["pid"], *(child.pid for child in psutil.Process(process["pid"]).children(recursive=True))]
            groups.setdefault({"nats-server": "nats"}.get(group, group), []).extend(family)
        return groups


def sim_args(engines: Engines) -> dict[str, Any]:
    args: dict[str, Any] = {"kv_blocks": engines.kv_blocks, "max_num_seqs": 512, "max_batched_tokens": 8192}
    if engines.step_s == 0.0:
        return args | {"speedup": 0}
    if engines.step_s is not None:
        return args | {"step_s": engines.step_s}
    slope = _DECODE_SLOPE_MS / (engines.kv_blocks * engines.block_size)
    base, per_token, per_context = _PREFILL_MS
    # A step that computes prompts decodes too, as the mocker's does.
    terms = {"p0": base + _DECODE_MS, "p1": per_token, "p2": per_context, "p3": slope}
    terms |= {"d0": _DECODE_MS, "d1": 0.0, "d2": slope}
    return args | {"terms": {name: value / 1e3 for name, value in terms.items()}}


_ENDLESS = 1e9


def _mocker_timing(step_s: float | None) -> str:
    """Its options: as it is by default, of no cost, or paced. The two ratios multiply where a step decodes.

    Paced, a prompt adds nothing to a step, as in our simulated engine: the mocker's own 17 ms for it would make its
    steps longer and rarer than ours, and each of its frames a bigger one."""
    if step_s is None:
        return "--speedup-ratio 1"
    # A ratio of 0 does not mean infinite, whatever the mocker's help says.
    if step_s == 0.0:
        return f"--speedup-ratio {_ENDLESS}"
    return f"--speedup-ratio {_ENDLESS} --decode-speedup-ratio {_DECODE_MS / 1e3 / step_s / _ENDLESS}"


@dataclass
class Dynamo(Stack):
    engines: Engines
    kit: Path
    state: Path
    name: str = "dynamo"
    target: Target = field(init=False)

    def __enter__(self) -> Self:
        port = _room_for_ports()
        engines = self.engines
        mocker = f"{_mocker_timing(engines.step_s)} --max-num-seqs 512 --block-size {engines.block_size}"
        mocker += f" --num-gpu-blocks-override {engines.kv_blocks}"
        command = [str(self.kit / "up.sh"), self._instance, str(port), "kv", str(engines.workers), mocker, ""]
        done = subprocess.run(["bash", *command], env=self._env, capture_output=True, text=True, timeout=_START_S)
        if done.returncode:
            self.__exit__()
            raise RuntimeError(f"Dynamo did not start:\n{done.stdout[-2000:]}{done.stderr[-1000:]}")
        pids = {path.stem: int(path.read_text()) for path in (self.state / "run" / self._instance).glob("*.pid")}
        groups = {"frontend": [pids.pop("frontend")], "workers": list(pids.values())}
        self.target = Target(port, "smollm2", groups)
        return self

    def __exit__(self, *_: object) -> None:
        command = ["bash", str(self.kit / "down.sh"), self._instance]
        subprocess.run(command, env=self._env, check=False, timeout=60, stdout=subprocess.DEVNULL)

    @property
    def _instance(self) -> str:
        return f"bench-{os.getpid()}-{self.engines.name}"

    @property
    def _env(self) -> dict[str, str]:
        return os.environ | {"PEERS": str(self.state)}


def _room_for_ports() -> int:
    """The kit takes PORT and some from PORT + 100 on; ours come from 20,000 to 32,000."""
    return 12_000 + secrets.randbelow(7) * 1000


def install(kit: Path, state: Path) -> None:
    if not (state / "model" / "tokenizer.json").is_file():
        print(f"installing the peer into {state} ...", flush=True)
        command = ["bash", str(kit / "install.sh")]
        subprocess.run(command, env=os.environ | {"PEERS": str(state)}, check=True, stdout=subprocess.DEVNULL)
