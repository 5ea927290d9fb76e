"""Settings of a process: one frozen dataclass per service, one field per option, read from ``TANDEM_*``.

The environment is read here and nowhere else. A field ``nats_url`` is the variable ``TANDEM_NATS_URL``; its type
says how the text is parsed, its default what happens without it, its ``doc`` what it means. A ``TANDEM_*`` name that
no field of the service declares is an error, and names its nearest match: a misspelt option must not pass silently.

``TANDEM_NATS_URL_FILE`` names a file that holds the value of ``TANDEM_NATS_URL``, and so for every option: a password
need not be in the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from tandem.errors import ConfigError

PREFIX = "TANDEM_"
FILE_SUFFIX = "_FILE"

T = TypeVar("T")


def option(default: Any = dataclasses.MISSING, *, doc: str) -> Any:
    """A field of a settings class. Without ``default`` the variable must be set."""
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"doc": doc})
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What every service has."""

    deployment: str = option(doc="Path of the deployment file.")
    nats_url: str = option("nats://127.0.0.1:4222", doc="NATS server(s), comma-separated.")
    redis_url: str = option("redis://127.0.0.1:6379/0", doc="Redis server; unix:// works too.")
    instance: str = option("", doc="Name of this process in the cluster; made up when empty.")
    grpc_host: str = option("127.0.0.1", doc="Interface of the gRPC server; of a name's addresses, this machine's.")
    grpc_port: int = option(0, doc="Port of the gRPC server; 0 = any free one.")
    advertise_host: str = option("", doc="Host name under which other processes reach this one; grpc_host when empty.")
    metrics_host: str = option("127.0.0.1", doc="Interface of the Prometheus endpoint. It has no authentication.")
    metrics_port: int = option(0, doc="Port of the Prometheus endpoint; 0 = any free one (the log has it), -1 = none.")
    log_level: str = option("INFO", doc="DEBUG, INFO, WARNING or ERROR.")


def load(cls: type[T], environ: Mapping[str, str] | None = None) -> T:
    """``cls`` filled from the environment. ConfigError for a missing, malformed or unknown variable."""
    hints = get_type_hints(cls)
    fields = {PREFIX + f.name.upper(): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    env = _with_files(os.environ if environ is None else environ, fields)
    for name in env:
        if name.startswith(PREFIX) and name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(fields))}"
            raise ConfigError(f"unknown setting {name}{hint}", param=name)
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name in env:
            values[f.name] = _parse(name, env[name], hints[f.name])
        elif f.default is dataclasses.MISSING:
            raise ConfigError(f"{name} must be set: {f.metadata['doc']}", param=name)
    return cls(**values)


def _with_files(environ: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The environment with each ``NAME_FILE`` replaced by NAME and what the file holds."""
    env = dict(environ)
    for name in names:
        path = env.pop(name + FILE_SUFFIX, None)
        if path is None:
            continue
        if name in env:
            raise ConfigError(f"{name} and {name}{FILE_SUFFIX} are both set", param=name)
        try:
            env[name] = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}{FILE_SUFFIX}: cannot read {path}: {error}", param=name) from None
    return env


def _parse(name: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name}={text!r} is not a valid {kind.__name__}", param=name) from None
    raise TypeError(f"{name}: settings of type {kind} are not supported")
