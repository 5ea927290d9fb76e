"""Settings of a process: one frozen dataclass per service, one field per option, read from ``TANDEM_*``.

The environment is read here and nowhere else. A field ``nats_url`` is the variable ``TANDEM_NATS_URL``; its type
says how the text is parsed, its default what happens without it, its ``doc`` what it means. A ``TANDEM_*`` name that
no field of the service declares is an error, and names its nearest match: a misspelt option must not pass silently.

``TANDEM_NATS_URL_FILE`` names a file that holds the value of ``TANDEM_NATS_URL``, and so for every option: a password
need not be in the environment.

What a standard names otherwise keeps its name (``variable``): OpenTelemetry's ``OTEL_*``. Those may be for others too,
so an unknown one is no error, and an empty one is as good as none.
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


def option(default: Any = dataclasses.MISSING, *, doc: str, variable: str = "") -> Any:
    """A field of a settings class. Without ``default`` the variable must be set."""
    metadata = {"doc": doc, "variable": variable}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def variable_of(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata["variable"]) or PREFIX + field.name.upper()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracingSettings:
    """Which requests are traced, and where traces go. The exporter itself reads the rest of OTEL_* (headers,
    certificates, timeouts, compression, OTEL_BSP_*, OTEL_RESOURCE_ATTRIBUTES)."""

    trace_ratio: float = option(0.01, doc="Share of requests that are traced; a client's own decision stands.")
    trace_per_s: float = option(
        0.0, doc="Requests a second that are traced whatever the share; after a quiet while 20 at once."
    )
    trace_slow_s: float = option(
        5.0, doc="A first token later than this (or than the request's own target) has it traced after the fact."
    )
    trace_late_per_s: float = option(10.0, doc="Traces a second after the fact, of requests that failed or were slow.")
    trace_console: str = option("", doc="host:port of a console's OTLP/gRPC receiver: it gets every trace, too.")
    otel_sdk_disabled: bool = option(False, variable="OTEL_SDK_DISABLED", doc="true: no traces at all.")
    otel_traces_exporter: str = option("", variable="OTEL_TRACES_EXPORTER", doc="otlp, or none.")
    otel_endpoint: str = option(
        "", variable="OTEL_EXPORTER_OTLP_ENDPOINT", doc="The collector; without it traces go to the console alone."
    )
    otel_traces_endpoint: str = option("", variable="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", doc="The same, for traces.")
    otel_protocol: str = option("grpc", variable="OTEL_EXPORTER_OTLP_PROTOCOL", doc="grpc or http/protobuf.")
    otel_traces_protocol: str = option("", variable="OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", doc="The same, for traces.")
    otel_traces_sampler: str = option(
        "", variable="OTEL_TRACES_SAMPLER", doc="One of OpenTelemetry's six samplers, instead of TANDEM_TRACE_RATIO."
    )
    otel_traces_sampler_arg: str = option("", variable="OTEL_TRACES_SAMPLER_ARG", doc="Its ratio; 1.0 when empty.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonSettings(TracingSettings):
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


def load(cls: type[T], environ: Mapping[str, str] | None = None, *, shared: bool = False) -> T:
    """``cls`` filled from the environment. ConfigError for a missing, malformed or unknown variable.

    ``shared``: for a command in a shell or container whose variables are another process's."""
    hints = get_type_hints(cls)
    fields = {variable_of(f): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    env = _with_files(os.environ if environ is None else environ, fields)
    for name in env:
        if name.startswith(PREFIX) and name not in fields and not shared:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(fields))}"
            raise ConfigError(f"unknown setting {name}{hint}", param=name)
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name in env and (env[name] or name.startswith(PREFIX)):
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
