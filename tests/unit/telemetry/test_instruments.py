from __future__ import annotations

import asyncio
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem.errors import ConfigError
from tandem.telemetry import exposition
from tandem.telemetry import metric_table as table
from tandem.telemetry.classic_text import ClassicText
from tandem.telemetry.exposition import OFF, endpoint
from tandem.telemetry.instruments import Histogram, Instruments
from tandem.telemetry.metric_table import TABLE, Kind

DOMAINS = {"model": {"m"}, "tenant": {"acme"}, "class": {"chat"}, "version": {"1"}}


@pytest.fixture
def instruments() -> Instruments:
    return Instruments("frontend", DOMAINS)


def text(instruments: Instruments) -> str:
    return ClassicText().of(instruments.read())


def test_a_counter_is_one_cell_for_each_set_of_labels(instruments: Instruments) -> None:
    cell = instruments.counter(table.GOOD_REQUESTS, "m", "acme", "chat")
    assert cell is instruments.counter(table.GOOD_REQUESTS, "m", "acme", "chat")
    cell.add()
    cell.add(2)
    assert 'tandem_good_requests_total{class="chat",model="m",tenant="acme"} 3.0' in text(instruments)


def test_what_no_deployment_file_names_makes_no_series(instruments: Instruments) -> None:
    for n in range(1000):
        instruments.counter(table.GOOD_REQUESTS, f"model-{n}", f"tenant-{n}", "chat").add()
    lines = [line for line in text(instruments).splitlines() if line.startswith("tandem_good_requests_total{")]
    assert lines == ['tandem_good_requests_total{class="chat",model="other",tenant="other"} 1000.0']
    instruments.allow({"tenant": {"new"}})
    instruments.counter(table.GOOD_REQUESTS, "m", "new", "chat").add()
    assert 'tenant="new"' in text(instruments)


def test_readings_that_become_the_same_series_add_up(instruments: Instruments) -> None:
    instruments.watch(table.REQUESTS_OPEN, lambda: [(("m",), 1), (("x",), 2), (("y",), 3)])
    assert 'tandem_frontend_open_requests{model="m"} 1.0' in text(instruments)
    assert 'tandem_frontend_open_requests{model="other"} 5.0' in text(instruments)


@pytest.mark.parametrize(("value", "bucket"), [(0.0, 0), (0.001, 0), (0.0011, 1), (10.0, 15), (10.1, 16), (1e9, 16)])
def test_a_bound_belongs_to_its_bucket(value: float, bucket: int) -> None:
    histogram = Histogram(table.TIME_TO_FIRST_TOKEN.buckets)
    histogram.observe(value)
    assert histogram.counts.index(1) == bucket


def test_buckets_are_told_cumulated(instruments: Instruments) -> None:
    cell = instruments.histogram(table.TIME_TO_FIRST_TOKEN, "chat", "tandem", "m", "acme", "chat")
    for value in (0.0005, 0.3, 99.0):
        cell.observe(value)
    counts = {
        line.split('le="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in text(instruments).splitlines()
        if 'le="' in line
    }
    assert (counts["0.001"], counts["0.25"], counts["0.5"], counts["10.0"], counts["+Inf"]) == (1, 1, 2, 2, 3)


def test_the_librarys_parser_reads_what_was_counted() -> None:
    name = 'a "b"\\\n'
    instruments = Instruments("frontend", {**DOMAINS, "tenant": {name}})
    instruments.counter(table.GOOD_REQUESTS, "m", name, "chat").add(2.5)
    cell = instruments.histogram(table.TIME_TO_FIRST_TOKEN, "chat", "tandem", "m", name, "chat")
    for value in (0.5, 1e6):
        cell.observe(value)
    writer = ClassicText()
    for _ in range(2):  # the second time with names that are kept
        families = {f.name: f for f in text_string_to_metric_families(writer.of(instruments.read()))}
        (good,) = families[table.GOOD_REQUESTS.name.removesuffix("_total")].samples
        assert (good.labels, good.value) == ({"model": "m", "tenant": name, "class": "chat"}, 2.5)
        ttft = families[table.TIME_TO_FIRST_TOKEN.name]
        assert (ttft.type, ttft.documentation) == ("histogram", table.TIME_TO_FIRST_TOKEN.help)
        by_name = {s.name: s.value for s in ttft.samples}
        assert by_name[f"{ttft.name}_count"] == 2
        assert by_name[f"{ttft.name}_sum"] == 1e6 + 0.5
        assert {s.labels["tenant"] for s in ttft.samples} == {name}


def test_only_rows_of_this_service_with_their_labels(instruments: Instruments) -> None:
    for wrong in (
        lambda: instruments.counter(table.PLACED_TOKENS, "m"),
        lambda: instruments.counter(table.TIME_TO_FIRST_TOKEN, "m"),
        lambda: instruments.counter(table.GOOD_REQUESTS, "m"),
        lambda: instruments.watch(table.REQUEST_DURATION, list),
    ):
        with pytest.raises(ValueError, match=r"tandem_|gen_ai_"):
            wrong()


def test_the_table_is_well_made() -> None:
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names)
    for metric in TABLE:
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
        assert set(metric.services) <= set(table.SERVICE.values), metric.name
        assert metric.help.endswith("."), metric.name
        for label in metric.labels:
            assert label.values or table.DOMAINS.get(label.name, label.name) in DOMAINS, (metric.name, label.name)


def get(port: int, **headers: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/plain")
        return str(answer.read().decode())


async def test_the_endpoint_answers_with_what_the_loop_knows(instruments: Instruments) -> None:
    instruments.counter(table.RESUBMISSIONS, "m").add(7)
    async with endpoint(instruments, "127.0.0.1", 0) as port:
        found = await asyncio.to_thread(get, port)
    assert 'tandem_frontend_resubmissions_total{model="m"} 7.0' in found
    assert "process_cpu_seconds_total" in found


async def test_vllms_names_keep_their_colon_whatever_format_is_asked_for() -> None:
    instruments = Instruments("decode", DOMAINS)
    instruments.watch_one(table.VLLM_RUNNING, lambda: 1.0, "m", "0")
    wish = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    async with endpoint(instruments, "127.0.0.1", 0) as port:
        assert 'vllm:num_requests_running{engine="0",model_name="m"} 1.0' in await asyncio.to_thread(
            lambda: get(port, Accept=wish)
        )


async def test_a_loop_that_hangs_fails_the_scrape(instruments: Instruments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "READ_TIMEOUT_S", 0.3)
    async with endpoint(instruments, "127.0.0.1", 0) as port:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            get(port)  # on the loop, which can therefore not answer


async def test_a_port_that_is_taken_is_named(instruments: Instruments) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*TANDEM_METRICS_PORT"):
            async with endpoint(instruments, "127.0.0.1", port):
                pass


async def test_off_is_off(instruments: Instruments) -> None:
    async with endpoint(instruments, "127.0.0.1", OFF) as port:
        assert port == OFF
