from __future__ import annotations

import subprocess
import sys

import pytest

from tandem.adapters import settings
from tandem.adapters.settings import CommonSettings
from tandem.adapters.traces import destinations_of, open_tracing, sampling_of
from tandem.errors import ConfigError
from tandem.telemetry.export import GRPC, HTTP, Destination


def given(**environ: str) -> CommonSettings:
    return settings.load(CommonSettings, {"TANDEM_DEPLOYMENT": "d", **environ})


def test_nothing_is_traced_when_nobody_listens() -> None:
    assert destinations_of(given()) == []
    assert not open_tracing(given(), "router", cluster="c", instance="i").enabled
    assert destinations_of(given(OTEL_EXPORTER_OTLP_ENDPOINT="")) == []


def test_where_traces_go() -> None:
    collector = "http://collector:4317"
    assert [d.protocol for d in destinations_of(given(OTEL_EXPORTER_OTLP_ENDPOINT=collector))] == [GRPC]
    found = destinations_of(given(OTEL_EXPORTER_OTLP_ENDPOINT=collector, OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf"))
    assert [(d.protocol, d.endpoint) for d in found] == [(HTTP, "")], "the exporter adds /v1/traces"
    (own,) = destinations_of(given(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector))
    assert own.endpoint == collector
    both = destinations_of(given(OTEL_EXPORTER_OTLP_ENDPOINT=collector, TANDEM_TRACE_CONSOLE="127.0.0.1:9"))
    assert both[1] == Destination(GRPC, "http://127.0.0.1:9", both[1].delay_ms) and len(both) == 2
    none = given(OTEL_EXPORTER_OTLP_ENDPOINT=collector, OTEL_TRACES_EXPORTER="none", TANDEM_TRACE_CONSOLE="c:9")
    assert [d.endpoint for d in destinations_of(none)] == ["http://c:9"]
    assert destinations_of(given(OTEL_EXPORTER_OTLP_ENDPOINT=collector, OTEL_SDK_DISABLED="true")) == []


@pytest.mark.parametrize(
    ("sampler", "argument", "ratio", "parent_based"),
    [
        ("", "", 0.25, True),
        ("always_on", "", 1.0, False),
        ("parentbased_always_off", "", 0.0, True),
        ("traceidratio", "0.5", 0.5, False),
        ("parentbased_traceidratio", "0.1", 0.1, True),
        ("parentbased_traceidratio", "", 1.0, True),
    ],
)
def test_samplers_of_the_standard(sampler: str, argument: str, ratio: float, parent_based: bool) -> None:
    found = sampling_of(given(TANDEM_TRACE_RATIO="0.25", OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=argument))
    assert (found.ratio, found.parent_based) == (ratio, parent_based)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"OTEL_TRACES_SAMPLER": "sometimes"}, "OTEL_TRACES_SAMPLER"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "half"}, "half"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}, "from 0 to 1"),
        ({"TANDEM_TRACE_RATIO": "-1"}, "from 0 to 1"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "otlp or none"),
    ],
)
def test_mistakes_are_told(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_tracing(given(OTEL_EXPORTER_OTLP_ENDPOINT="http://c:1", **environ), "router", cluster="c", instance="i")


def test_no_service_imports_the_tracing_sdk_by_itself() -> None:
    """(Of the SDK, redis-py imports the part for metrics, wherever it is installed.)"""
    check = """
import sys, services.router.app, services.frontend.app, tandem.worker.shell
found = [name for name in sys.modules if name.startswith(("opentelemetry.sdk.trace", "opentelemetry.exporter"))]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
