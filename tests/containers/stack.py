"""The compose file brought up under a project name and ports of its own, and what the tests do to it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.adapters.embedded import free_port
from tandem.telemetry.metric_table import KV_BYTES
from tests.containers.engine import COMPOSE_DIR, OBSERVABILITY_FILE, ROOT, run

BUILD_S = 1500
UP_S = 420


def written_sizes() -> dict[str, float]:
    """What docs/compose.md says that images weigh, in MB."""
    rows = re.findall(r"^\| tandem-(\S+) \| ([\d,]+) \|$", (ROOT / "docs" / "compose.md").read_text(), re.M)
    return {name: float(size.replace(",", "")) for name, size in rows}


class Stack:
    def __init__(self, project: str, profile: str, *files: Path) -> None:
        self.project, self.profile = project, profile
        self.http_port, self.grpc_port, self.console_port = free_port(), free_port(), free_port()
        self.prometheus_port = free_port()
        ports = {
            "TANDEM_HTTP_PORT": str(self.http_port),
            "TANDEM_GRPC_PORT": str(self.grpc_port),
            "TANDEM_CONSOLE_PORT": str(self.console_port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
        }
        # Where wheels lie, they are enough: no index is asked.
        offline = {"PIP_NO_INDEX": "1"} if any((ROOT / "deploy" / "wheels").glob("*.whl")) else {}
        self._env = {**os.environ, **ports, **offline}
        self._command = ["docker", "compose", "--progress", "plain", "-p", project, "--profile", profile]
        for file in (COMPOSE_DIR / "compose.yaml", *files):
            self._command += ["-f", str(file)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def compose(self, *arguments: str, timeout_s: float = 120) -> str:
        """What it printed. CalledProcessError with the output."""
        return run(*self._command, *arguments, env=self._env, timeout_s=timeout_s).stdout

    def observed(self, *arguments: str, timeout_s: float = 120) -> str:
        """The same, with the observability file's services beside the others."""
        return self.compose("-f", str(OBSERVABILITY_FILE), *arguments, timeout_s=timeout_s)

    def build(self, *services: str) -> None:
        self.compose("build", "--quiet", *services, timeout_s=BUILD_S)

    def up(self, *arguments: str) -> None:
        self.compose("up", "-d", "--wait", *arguments, timeout_s=UP_S)

    def down(self) -> None:
        self.observed("down", "--volumes", "--timeout", "5", timeout_s=UP_S)

    def containers(self, service: str = "") -> list[str]:
        """Names of the running ones."""
        lines = self.compose("ps", "--format", "json", *([service] if service else [])).splitlines()
        return sorted(json.loads(line)["Name"] for line in lines if line.strip())

    def inspect(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("docker", "inspect", container).stdout)[0]
        return found

    def inside(self, container: str, *command: str) -> str:
        return run("docker", "exec", container, *command).stdout

    def status(self) -> dict[str, Any]:
        """What `tandem status --json` says, asked from inside: routers are not published."""
        routers = self.containers("router")
        status = ("python", "-m", "tandem.cli.main", "status", "--json", "--router", f"{routers[0]}:7000")
        found: dict[str, Any] = json.loads(self.inside(routers[0], *status))
        return found

    def workers(self) -> list[str]:
        return [worker["info"]["ref"]["id"] for worker in self.status()["workers"] if worker["liveness"] == "alive"]

    def kv_bytes(self, service: str) -> float:
        """Pulled so far by the running workers of a service, by their own count."""
        script = (
            "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9090/metrics', timeout=20).read().decode())"
        )
        lines = [
            line
            for container in self.containers(service)
            for line in self.inside(container, "python", "-c", script).splitlines()
        ]
        return sum(float(line.split()[-1]) for line in lines if line.startswith(KV_BYTES.name))

    def size_of_image(self, container: str) -> float:
        """In MB."""
        return float(self.inspect(self.inspect(container)["Image"])["Size"]) / 1e6

    def logs(self, services: Sequence[str] = (), lines: int = 40) -> str:
        return self.compose("logs", "--no-color", "--tail", str(lines), *services)
