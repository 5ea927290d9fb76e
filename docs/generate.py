"""Writes the reference pages from the tables that the code itself uses.

python docs/generate.py           write them
python docs/generate.py --check   fail if a page is not what its table says
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from services.console.config import ConsoleSettings
from services.frontend.config import FrontendSettings
from services.frontend.http_errors import HTTP_STATUS
from services.router.config import RouterSettings
from tandem import errors
from tandem.adapters import deployment, settings
from tandem.adapters.grpc_errors import STATUS
from tandem.cli.chat import ChatSettings
from tandem.cli.cluster import TRACES_PER_S
from tandem.cli.console_client import ConsoleClientSettings
from tandem.cli.up import UpSettings
from tandem.core.policy import Policy
from tandem.telemetry import metric_table, spans
from tandem.telemetry.sampling import SamplingPolicy
from tandem.worker.settings import WorkerSettings

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py (`make docs`). -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *(line(row) for row in rows)]


def code(value: object) -> str:
    return f"`{value}`"


# -- deployment file ---------------------------------------------------------------------------------------------------

#: In the order of the page: (class, where it stands in the file, what it is).
PARTS: list[tuple[type[BaseModel], str]] = [
    (deployment.Deployment, "the file itself"),
    (deployment.Model, "`models:`"),
    (deployment.Pool, "`models: pools:`"),
    (deployment.Class, "`classes:`"),
    (deployment.Tenant, "`tenants:`"),
    (deployment.Limits, "`limits:`"),
    (deployment.Record, "`record:`"),
    (deployment.Liveness, "`liveness:`"),
    (deployment.Endpoint, "`http:` and `grpc:`"),
    (deployment.Console, "`console:`"),
]


def deployment_page() -> list[str]:
    lines = [
        "# The deployment file",
        "",
        "What `tandem up -f FILE` starts and every process of the cluster reads: YAML, unknown keys are errors.",
        "Relative model folders and chat templates are looked for beside the file. An example is in the README;",
        "`tandem up --print-deployment` prints the built-in one, or any other with the command line's changes.",
    ]
    for cls, place in PARTS:
        lines += ["", f"## {place[0].upper()}{place[1:]}", ""]
        about = (cls.__doc__ or "").strip()
        if about and not about.startswith("!!!"):
            lines += [about, ""]
        rows = [(code(n), _kind(f.annotation), _default(f), f.description or "") for n, f in cls.model_fields.items()]
        lines += table(("key", "type", "default", "meaning"), rows)
    lines += ["", "## `policy:`", "", "Knobs of the decision core.", ""]
    knobs = [(code(k.name), code(_yaml(k.default)), k.metadata["help"]) for k in dataclasses.fields(Policy)]
    return lines + table(("key", "default", "meaning"), knobs)


def _kind(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(code(value) for value in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in arguments if part is not type(None))
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " or ".join(code(member.value) for member in kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.__name__.lower()
    return {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}.get(kind, str(kind))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return code(" ".join(f"{n}: {v}" for n, v in value.model_dump(exclude_defaults=True).items()) or "{}")
    if isinstance(value, tuple):
        return code([item.name for item in value]) if value else "none"
    if value is None or value == "" or value == {}:
        return "none"
    return code(_yaml(value))


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- errors ------------------------------------------------------------------------------------------------------------


def errors_page() -> list[str]:
    lines = [
        "# Errors",
        "",
        "Each error has one stable `code`: in HTTP bodies (`error.code`), in gRPC's trailing metadata",
        "(`tandem-error-bin`, an `ErrorDetail`), in logs and in metrics. *Retryable* means that the same request may",
        "succeed if it is sent again; with 429 and 503, `retry-after` says when. A stream that has opened says it as",
        "an event of the same content. The hint travels along (`error.hint`).",
        "",
    ]
    rows = []
    for name, cls in sorted(errors.all_errors().items()):
        status, kind = HTTP_STATUS[cls]
        retry = "yes" if cls.retryable else "no"
        rows.append((code(name), cls.meaning, cls.hint, retry, f"{status} {code(kind)}", code(STATUS[cls].name)))
    return lines + table(("code", "meaning", "hint", "retryable", "HTTP", "gRPC"), rows)


# -- settings ----------------------------------------------------------------------------------------------------------

SERVICES: list[tuple[str, type[Any]]] = [
    ("`services.frontend`", FrontendSettings),
    ("`services.router`", RouterSettings),
    ("`services.console`", ConsoleSettings),
    ("`services.prefill` and `services.decode`", WorkerSettings),
]
COMMANDS: list[tuple[str, type[Any]]] = [
    ("`tandem up`", UpSettings),
    ("`tandem chat`", ChatSettings),
    ("`tandem trace` and `tandem top`", ConsoleClientSettings),
]


def settings_page() -> list[str]:
    lines = [
        "# Settings",
        "",
        f"Environment variables, `{settings.PREFIX}` in front. A name that the process does not know is an error.",
        "`tandem up` sets those of the services itself; whoever runs a service otherwise sets them.",
        "",
        "## All services",
        "",
        *_settings_table(dataclasses.fields(settings.CommonSettings)),
    ]
    common = {f.name for f in dataclasses.fields(settings.CommonSettings)}
    for title, cls in SERVICES + COMMANDS:
        own = [
            f for f in dataclasses.fields(cls) if f.name not in common or not issubclass(cls, settings.CommonSettings)
        ]
        lines += ["", f"## {title}", "", *_settings_table(own)]
    return lines


def _settings_table(fields: Iterable[dataclasses.Field[Any]]) -> list[str]:
    rows = []
    for field in fields:
        required = field.default is dataclasses.MISSING
        default = "required" if required else "empty" if field.default == "" else code(field.default)
        rows.append((code(settings.variable_of(field)), default, field.metadata["doc"]))
    return table(("variable", "default", "meaning"), rows)


# -- tracing -----------------------------------------------------------------------------------------------------------

TRACING_INTRO = """# Tracing

One trace per request, over OTLP. `OTEL_EXPORTER_OTLP_ENDPOINT` (and its relatives) names the collector,
`OTEL_EXPORTER_OTLP_PROTOCOL` says `grpc` (default) or `http/protobuf`; [settings.md](settings.md) has every option.
Without a collector and without a console nothing is traced, and no exporter is imported.

**Whose trace.** A client's `traceparent` (HTTP header, gRPC metadata) is honoured: its trace goes on, and its decision
whether it is sampled stands. Without one the frontend begins a trace and decides: `TANDEM_TRACE_RATIO` of the
requests, and up to `TANDEM_TRACE_PER_S` a second whatever the share, after a quiet while {at_once} at once. `tandem up`
traces {per_s} a second, so that whoever tries something sees all of it in the console, and under load it costs little.

**After the fact.** A request that nobody sampled and that failed, or whose first token was late
(`TANDEM_TRACE_SLOW_S`, or its own target), is traced all the same, `TANDEM_TRACE_LATE_PER_S` at most: the frontend
makes the spans of the router and the workers from what it saw itself and from the durations in the finish frame.
Such spans say `tandem.reconstructed`. A request that is refused before it is one (400, 401) has no trace.

**Clocks.** Every span lies within one process, so its length is right. Between hosts, spans of one trace are as far
out of place as the hosts' clocks are apart: run NTP or chrony.

**What is not there.** Text of prompts and answers, tokens, API keys, headers.

Resource attributes: `service.name` (`tandem-frontend`, `tandem-router`, `tandem-prefill`, `tandem-decode`),
`service.namespace` (`tandem`), `service.instance.id` (the process's name in the cluster), `service.version`,
`host.name`, `process.pid`, `tandem.cluster`; workers: `tandem.model`, `tandem.pool`. `OTEL_SERVICE_NAME` and
`OTEL_RESOURCE_ATTRIBUTES` go before. The scope of the spans is `tandem`."""


def tracing_page() -> list[str]:
    lines = [TRACING_INTRO.format(per_s=TRACES_PER_S, at_once=round(SamplingPolicy().at_once)), "", "## Spans", ""]
    lines += table(
        ("span", "made by", "parent", "meaning"), [(code(s.name), s.process, s.parent, s.meaning) for s in spans.SPANS]
    )
    for span in spans.SPANS:
        if not span.allowed:
            continue
        lines += ["", f"### `{span.name}`", ""]
        rows = [
            (code(name), spans.ATTRIBUTES[name].kind, "always" if name in span.always else "", _meaning(name))
            for name in (*span.always, *span.attributes)
        ]
        lines += table(("attribute", "type", "", "meaning"), rows)
        if span.events:
            lines += ["", "Events:", ""]
            lines += table(
                ("event", "meaning", "attributes"),
                [(code(e.name), e.meaning, ", ".join(map(code, e.attributes))) for e in span.events],
            )
    lines += ["", "## What a request waits for", "", f"Values of `{spans.QUEUE_REASON}`:", ""]
    return lines + table(("value", "meaning"), [(code(k), v) for k, v in spans.QUEUE_REASONS.items()])


def _meaning(attribute: str) -> str:
    return spans.ATTRIBUTES[attribute].meaning


# -- metrics -----------------------------------------------------------------------------------------------------------

METRICS_INTRO = """\
# Metrics

Each service has a Prometheus endpoint of its own, `http://TANDEM_METRICS_HOST:TANDEM_METRICS_PORT/metrics`.
It has no authentication and binds the loopback interface unless it is told otherwise. `tandem up` gives every process a
free port: `tandem status` lists them, and `prometheus.json` in the run folder has them as Prometheus' `file_sd_configs`
reads it. Alert rules and Grafana dashboards are in `deploy/observability/`.

A scrape is answered by the event loop, so a process that hangs fails its scrapes. Labels have the values of the
deployment file (`model`, `tenant`, `class`) or of the lists below; anything else becomes `other`.

**Goodput and attainment** are over *offered* requests: refused and failed ones count as missed, a client's own mistake
(4xx but 429) and a request that its client cancels before any SLO is broken do not count. Of one class, over 5 minutes:

    sum(rate(tandem_good_requests_total{class="interactive"}[5m]))
      / sum(rate(tandem_offered_requests_total{class="interactive"}[5m]))

A request with several answers has the TTFT of the first that begins, and a TPOT over their mean length.

`python -m bench.bench_metrics` prints what it costs; `docs/decisions/metrics-cells.md` says why it is as it is."""

METRIC_PARTS: list[tuple[str, tuple[str, ...]]] = [
    ("Frontend", metric_table.FRONTEND),
    ("Router", metric_table.ROUTER),
    ("Prefill and decode workers", metric_table.WORKERS),
    ("Every process", metric_table.ALL),
    ("Every process that is traced", metric_table.TRACED),
]


def metrics_page() -> list[str]:
    lines = [*METRICS_INTRO.splitlines()]
    for title, services in METRIC_PARTS:
        rows = [m for m in metric_table.TABLE if m.services == services and m not in metric_table.VLLM]
        lines += ["", f"## {title}", "", *_metrics_table(rows)]
    lines += [
        "",
        "## vLLM's own",
        "",
        "A worker on vLLM gives out all metrics of its vLLM, unchanged. One on the simulated engine has these of them:",
        "",
        *_metrics_table(metric_table.VLLM),
    ]
    labels = {label.name: label for metric in metric_table.TABLE for label in metric.labels}
    labels.pop("reason")
    kinds = [*labels.values(), metric_table.REASON, metric_table.FAILURE]
    lines += ["", "## Labels", ""]
    lines += table(
        ("label", "meaning", "values"),
        [(code(label.name), label.meaning, ", ".join(code(v) for v in label.values if v)) for label in kinds],
    )
    buckets = dict.fromkeys((m.buckets, m.name) for m in metric_table.TABLE if m.buckets)
    lines += ["", "## Buckets", ""]
    return lines + table(("histogram", "bounds"), [(code(n), ", ".join(f"{b:g}" for b in bs)) for bs, n in buckets])


def _metrics_table(metrics: Iterable[metric_table.Metric]) -> list[str]:
    rows = [
        (code(metric.name), metric.kind.value, ", ".join(map(code, metric.label_names)), metric.help)
        for metric in metrics
    ]
    return table(("name", "type", "labels", "meaning"), rows)


PAGES = {
    "deployment-file.md": deployment_page,
    "errors.md": errors_page,
    "metrics.md": metrics_page,
    "settings.md": settings_page,
    "tracing.md": tracing_page,
}


def main() -> int:
    check = "--check" in sys.argv[1:]
    stale = []
    for name, make in PAGES.items():
        page, text = HERE / name, "\n".join([NOTE, "", *make(), ""])
        if page.exists() and page.read_text() == text:
            continue
        stale.append(name)
        if not check:
            page.write_text(text)
    if check and stale:
        print(f"not up to date (run `make docs`): {', '.join(stale)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
