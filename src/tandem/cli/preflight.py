"""Everything that can be seen to be wrong before a process is started, said in words and with what to do about it."""

from __future__ import annotations

import errno
import importlib.util
import shutil
import socket
from pathlib import Path

from tandem.adapters.deployment import Deployment, Model
from tandem.core.policy import policy_from
from tandem.errors import ConfigError
from tandem.models.prepare import Progress, resolve_model

#: For JetStream's files, sockets and logs.
_ROOM_BYTES = 256 << 20
_LEAST_TOKEN = 16
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_ports(deployment: Deployment) -> None:
    """ConfigError names the first port that is taken, and the setting that moves it."""
    for kind, endpoint, setting, count in (
        ("HTTP", deployment.http, "http", deployment.frontends),
        ("gRPC", deployment.grpc, "grpc", deployment.frontends * deployment.processes),
    ):
        if endpoint.port == 0:
            raise ConfigError(f"{setting}.port must be a port number, not 0", param=f"{setting}.port")
        for n in range(count):
            _check_port(kind, endpoint.host, endpoint.port + n, setting)
    if deployment.console.enabled and deployment.console.port:
        _check_port("console", deployment.console.host, deployment.console.port, "console")


def _check_port(kind: str, host: str, port: int, setting: str) -> None:
    if port > 65535:
        raise ConfigError(f"{setting}.port: {port} is not a port number", param=f"{setting}.port")
    hint = f"choose another with --{setting}-port, or `{setting}: {{port: ...}}` in the deployment file"
    try:
        family, kind_, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"{setting}.host: {host!r} is no address of this machine: {error.strerror}") from None
    with socket.socket(family, kind_, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"the {kind} port {port} on {host} is taken by another program; {hint}", param=f"{setting}.port"
                ) from None
            raise ConfigError(f"cannot listen on {host}:{port} ({kind}): {error.strerror}; {hint}") from None


def check_console(deployment: Deployment, token: str) -> None:
    """ConfigError where the console would show everybody's requests to the network."""
    console = deployment.console
    if console.enabled and token and len(token) < _LEAST_TOKEN:
        raise ConfigError(f"TANDEM_CONSOLE_TOKEN must have {_LEAST_TOKEN} characters at least", param="console_token")
    if console.enabled and console.host not in _LOOPBACK and not token:
        raise ConfigError(
            f"the console shows everybody's requests: on {console.host} it needs TANDEM_CONSOLE_TOKEN in the "
            f"environment ({_LEAST_TOKEN} characters at least), or `console: {{enabled: false}}` in the file",
            param="console.host",
        )


def check_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _ROOM_BYTES:
        raise ConfigError(
            f"{folder} has {free >> 20} MiB free, and {_ROOM_BYTES >> 20} MiB are needed. Free some space, "
            "or point XDG_STATE_HOME to a larger disk.",
            param="XDG_STATE_HOME",
        )


def check_policy(deployment: Deployment) -> None:
    """ConfigError for a knob that does not exist, or a value that is not one."""
    policy_from(deployment.policy)


def check_engines(deployment: Deployment) -> None:
    engines = {pool.engine for model in deployment.models for pool in model.pools if pool.replicas}
    if "vllm" in engines and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "the engine vLLM is not installed in this environment: `make setup` installs it, "
            "and `tandem up --engine sim` does without it",
            param="engine",
        )


def find_models(deployment: Deployment, folder: Path, progress: Progress) -> dict[str, Path]:
    """The folder of each model, by its name; made where it is one that Tandem brings. ConfigError if broken."""
    return {model.name: _find_model(model, folder, progress) for model in deployment.models}


def _find_model(model: Model, folder: Path, progress: Progress) -> Path:
    weights = any(pool.engine != "sim" for pool in model.pools)
    beside_file = folder / Path(model.path).expanduser()
    return resolve_model(str(beside_file) if beside_file.is_dir() else model.path, weights=weights, progress=progress)
