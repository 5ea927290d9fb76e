"""A whole cluster under test: `tandem up` in a process of its own, looked at from outside like a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from tandem.adapters.embedded import free_port


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of ``condition``. AssertionError naming ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {timeout_s:.0f} s")


def free_ports(count: int) -> int:
    """The first of so many in a row."""
    found = [free_port()]
    while len(found) < count:
        port = free_port()
        found = [*found, port] if port == found[-1] + 1 else [port]
    return found[0]


class Cluster:
    def __init__(
        self, deployment: dict[str, Any], folder: Path, *arguments: str, env: Mapping[str, str] | None = None
    ) -> None:
        """``env``: settings of `tandem up`, such as a server of one's own."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._env = dict(env or {})
        frontends = int(deployment.get("frontends", 1))
        self.http_port, self.grpc_port = free_ports(frontends), free_ports(frontends)
        self.deployment_file = folder / "deployment.yaml"
        self.write(deployment)
        self._arguments = arguments
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, deployment: dict[str, Any]) -> None:
        """The deployment file anew, with this cluster's ports."""
        ports = {
            "http": {"host": "127.0.0.1", "port": self.http_port},
            "grpc": {"host": "127.0.0.1", "port": self.grpc_port},
        }
        self.deployment_file.write_text(yaml.safe_dump({**deployment, **ports}))

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float) -> Cluster:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TANDEM_")}
        env.update(self._env)
        env["XDG_RUNTIME_DIR"] = env["XDG_STATE_HOME"] = str(self.folder)
        command = [sys.executable, "-m", "tandem.cli.main", "up", "-f", str(self.deployment_file), *self._arguments]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            wait_for(self._ready_or_dead, timeout_s, "cluster ready")
            assert self._process.poll() is None, "the cluster ended"
        except BaseException:
            print(self.log())
            self.stop()
            raise
        return self

    def _ready_or_dead(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None or bool(self.state().get("ready"))

    def stop(self, timeout_s: float = 60.0) -> int:
        """Ctrl-C. Returns the exit status; kills what does not leave, and fails then."""
        process = self._process
        if process is None:
            return 0
        self._process = None
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError("the cluster did not stop:\n" + self.log()[-5000:]) from None
        finally:
            _, alive = psutil.wait_procs(children, timeout=5)
            for child in alive:
                child.kill()
        assert not alive, f"outlived the cluster: {alive}"
        return status

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- looking ---------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def state(self) -> dict[str, Any]:
        found = list(self.folder.glob("tandem/*/state.json"))
        if not found:
            return {}
        try:
            state: dict[str, Any] = json.loads(found[0].read_text())
        except (OSError, json.JSONDecodeError):  # being written
            return {}
        return state

    def processes(self, kind: str) -> list[dict[str, Any]]:
        """Entries of the state file of that kind: server, router, prefill, decode, frontend."""
        return [p for p in self.state().get("processes", []) if p["kind"] == kind]

    # -- harming ---------------------------------------------------------------------------------------------------

    def signal(self, name: str, number: signal.Signals) -> int:
        """To one process by its name; returns its pid."""
        for process in self.state()["processes"]:
            if process["name"] == name:
                os.kill(process["pid"], number)
                return int(process["pid"])
        raise AssertionError(f"no process {name!r}: {[p['name'] for p in self.state()['processes']]}")

    def wait_restarted(self, name: str, old_pid: int, timeout_s: float) -> None:
        def restarted() -> bool:
            for process in self.state().get("processes", []):
                if process["name"] == name and process["pid"] != old_pid:
                    return bool(process["state"] == "ready")
            return False

        wait_for(restarted, timeout_s, f"{name} restarted")
