"""NATS and Redis containers in the place of the embedded servers, and the port suites that run over them."""

from __future__ import annotations

import asyncio
import inspect
from types import ModuleType
from typing import Any

from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from tandem.adapters.embedded import free_port
from tests.containers.engine import image_names

_, NATS_IMAGE, REDIS_IMAGE, _ = image_names()


class Server:
    """Can be taken away and comes back empty, at the same address; as ``EmbeddedServer``."""

    def __init__(self, scheme: str, image: str, port: int, command: list[str], ready: str) -> None:
        self._host_port = free_port()
        self.url = f"{scheme}://127.0.0.1:{self._host_port}"
        self._image, self._port, self._command, self._ready = image, port, command, ready
        self._container: DockerContainer | None = None

    async def start(self) -> None:
        made = DockerContainer(self._image).with_command(self._command)  # type: ignore[arg-type]
        made.ports[f"{self._port}/tcp"] = ("127.0.0.1", self._host_port)  # type: ignore[assignment]  # docker's own form
        made.waiting_for(LogMessageWaitStrategy(self._ready).with_startup_timeout(60))
        self._container = await asyncio.to_thread(made.start)

    def kill(self) -> None:
        if self._container is not None:
            self._container.stop(force=True)
            self._container = None

    async def close(self) -> None:
        await asyncio.to_thread(self.kill)


def nats(max_payload: int) -> Server:
    script = f"echo 'max_payload: {max_payload}' > /tmp/c; exec nats-server -c /tmp/c"
    return Server("nats", NATS_IMAGE, 4222, ["sh", "-c", script], "Server is ready")


def redis() -> Server:
    options = ["--save", "", "--maxmemory-policy", "noeviction"]
    options += ["--hash-max-listpack-entries", "1024", "--hash-max-listpack-value", "256"]
    return Server("redis", REDIS_IMAGE, 6379, ["redis-server", *options], "Ready to accept connections")


def suite_of(module: ModuleType, *fixtures: str) -> dict[str, Any]:
    """A suite's tests that use one of these fixtures: where they are put, they get that module's."""
    found = {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_") and set(inspect.signature(test).parameters) & set(fixtures)
    }
    assert len(found) >= 5, f"{module.__name__} has only {len(found)} tests with {fixtures}: was a fixture renamed?"
    return found
