"""The metrics that every service has, and its endpoint: one context manager for the mains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version

from prometheus_client.registry import Collector

from tandem.adapters.addresses import own_address
from tandem.adapters.bus import Bus
from tandem.adapters.deployment import Deployment
from tandem.adapters.settings import CommonSettings
from tandem.telemetry import exposition
from tandem.telemetry import metric_table as table
from tandem.telemetry.export import OtlpSink
from tandem.telemetry.instruments import Instruments
from tandem.telemetry.tracing import Tracing

DISTRIBUTION = "tandem-serve"


def label_domains(deployment: Deployment) -> dict[str, set[str]]:
    """What labels may say that the deployment file decides."""
    return {
        "model": {model.name for model in deployment.models},
        "tenant": {tenant.name for tenant in deployment.tenants} or {"default"},
        "class": {request_class.name for request_class in deployment.classes},
    }


def instruments_of(service: str, deployment: Deployment, bus: Bus) -> Instruments:
    """With what all services have already in it."""
    build = version(DISTRIBUTION)
    instruments = Instruments(service, {**label_domains(deployment), "version": {build}})
    instruments.watch_one(table.BUILD, lambda: 1.0, service, build)
    stats = bus.stats
    instruments.watch_one(table.BUS_CONNECTED, lambda: float(bus.connected))
    instruments.watch_one(table.BUS_RECONNECTS, lambda: stats.reconnects)
    instruments.watch_one(table.BUS_MALFORMED, lambda: stats.malformed)
    instruments.watch_one(table.BUS_HANDLER_ERRORS, lambda: stats.handler_errors)
    instruments.watch_one(table.BUS_REFUSED, lambda: stats.refused_publishes)
    instruments.watch_one(table.BUS_ERRORS, lambda: stats.server_errors)
    return instruments


def watch_tracing(instruments: Instruments, tracing: Tracing) -> None:
    """How many spans there were, and how many a collector has. Nothing where nothing is traced."""
    sink = tracing.sink
    if isinstance(sink, OtlpSink):
        instruments.watch_one(table.SPANS, lambda: sink.offered)
        instruments.watch_one(table.SPANS_DELIVERED, lambda: sink.delivered)


def metrics_endpoint(
    settings: CommonSettings, instruments: Instruments, collectors: Sequence[Collector] = ()
) -> AbstractAsyncContextManager[int]:
    return exposition.endpoint(instruments, own_address(settings.metrics_host), settings.metrics_port, collectors)
