"""From settings to a process's ``Tracing``: whether there is one, what it samples, where it goes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from importlib.metadata import version

from tandem.adapters import clock
from tandem.adapters.settings import TracingSettings
from tandem.errors import ConfigError
from tandem.telemetry.export import GRPC, PROTOCOLS, Destination, OtlpSink
from tandem.telemetry.sampling import Sampler, SamplingPolicy
from tandem.telemetry.tracing import Tracing

DISTRIBUTION = "tandem-serve"
#: Between two batches of spans, each of which costs a millisecond of CPU here and one there: so late is what they hear.
#: The SDK's own default is 5 s.
_DELAY_MS = 1000.0


def open_tracing(settings: TracingSettings, service: str, *, cluster: str, instance: str, **attributes: str) -> Tracing:
    """Off when nobody is to get traces. ``attributes``: what else the process says about itself. ConfigError for an
    unknown protocol, exporter or sampler."""
    destinations = destinations_of(settings)
    if not destinations:
        return Tracing()
    resource: Mapping[str, str] = {
        "service.name": f"tandem-{service}",
        "service.namespace": "tandem",
        "service.instance.id": instance,
        "service.version": version(DISTRIBUTION),
        "host.name": socket.gethostname(),
        "process.pid": str(os.getpid()),
        "tandem.cluster": cluster,
        **{f"tandem.{name}": value for name, value in attributes.items()},
    }
    sink = OtlpSink(destinations, resource, monotonic=clock.monotonic, unix_ns=clock.unix_nanoseconds)
    return Tracing(sink, Sampler(sampling_of(settings)))


def destinations_of(settings: TracingSettings) -> list[Destination]:
    """The collector that OTEL_* name, and the console. None while OTEL_SDK_DISABLED."""
    if settings.otel_traces_exporter not in ("", "otlp", "none"):
        raise ConfigError(
            f"OTEL_TRACES_EXPORTER={settings.otel_traces_exporter!r}: otlp or none", param="OTEL_TRACES_EXPORTER"
        )
    found: list[Destination] = []
    if settings.otel_sdk_disabled:
        return found
    wanted = settings.otel_endpoint or settings.otel_traces_endpoint or settings.otel_traces_exporter == "otlp"
    if wanted and settings.otel_traces_exporter != "none":
        protocol = settings.otel_traces_protocol or settings.otel_protocol
        if protocol not in PROTOCOLS:
            raise ConfigError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r}: {' or '.join(PROTOCOLS)}",
                param="OTEL_EXPORTER_OTLP_PROTOCOL",
            )
        found.append(Destination(protocol, settings.otel_traces_endpoint, _DELAY_MS))
    if settings.trace_console:
        found.append(Destination(GRPC, f"http://{settings.trace_console}", _DELAY_MS))
    return found


def sampling_of(settings: TracingSettings) -> SamplingPolicy:
    ratio, parent_based = settings.trace_ratio, True
    if settings.otel_traces_sampler:
        ratio, parent_based = _of_otel(settings.otel_traces_sampler, settings.otel_traces_sampler_arg)
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(
            f"the share of traced requests is {ratio}; it must be from 0 to 1", param="TANDEM_TRACE_RATIO"
        )
    return SamplingPolicy(
        ratio=ratio,
        per_s=settings.trace_per_s,
        parent_based=parent_based,
        slow_ttft_s=settings.trace_slow_s,
        late_per_s=settings.trace_late_per_s,
    )


def _of_otel(sampler: str, argument: str) -> tuple[float, bool]:
    """(ratio, parent-based) of an OTEL_TRACES_SAMPLER."""
    kind = sampler.removeprefix("parentbased_")
    try:
        ratio = {"always_on": 1.0, "always_off": 0.0, "traceidratio": float(argument or 1.0)}[kind]
    except (KeyError, ValueError):
        raise ConfigError(
            f"OTEL_TRACES_SAMPLER={sampler!r} with OTEL_TRACES_SAMPLER_ARG={argument!r}: "
            "always_on, always_off, traceidratio, or one of these with parentbased_ before it",
            param="OTEL_TRACES_SAMPLER",
        ) from None
    return ratio, kind != sampler
