"""The ring of traces, what is said of one, and its export."""

from __future__ import annotations

import json

import pytest
from opentelemetry.proto.trace.v1 import trace_pb2

from services.console import spans as console_spans
from services.console import where_time_went
from services.console.chrome_trace import chrome_trace
from services.console.placement_words import in_words
from services.console.spans import spans_of
from services.console.summary import Slo
from services.console.trace_ring import MAX_SPANS, Trace, TraceRing
from services.console.trace_view import in_tree_order, whole
from tandem.telemetry import spans as names
from tests.unit.console.traces import MS, Given, as_spans, export, otlp, pairs, request_spans


def ring_of(size: int = 10, kept: int = 5, slos: dict[str, Slo] | None = None) -> tuple[TraceRing, list[Trace]]:
    ended: list[Trace] = []
    return TraceRing(size, kept, slos or {}, ended.append), ended


def add(ring: TraceRing, *spans: trace_pb2.Span) -> None:
    for span in as_spans(*spans):
        ring.add(span)


def test_a_request_is_summed_up_from_spans_of_several_processes_in_any_order() -> None:
    ring, ended = ring_of()
    add(ring, *reversed(request_spans(7)))
    assert [trace.trace_id for trace in ended] == [f"{7:032x}"]
    summary = ended[0].summary
    assert (summary.request_id, summary.tenant, summary.model, summary.decode_worker) == (
        "req-000007", "acme", "m", "decode-2",
    )  # fmt: skip
    assert (summary.ttft_s, summary.tpot_s, summary.itl_p99_s) == (0.05, 0.0065, 0.009)
    assert (summary.input_tokens, summary.cached_tokens, summary.output_tokens) == (1312, 1024, 20)
    assert summary.duration_s == pytest.approx(0.205)
    assert summary.queue_s == pytest.approx(0.001)


def test_a_trace_ends_once_and_is_known_before_it_ends() -> None:
    ring, ended = ring_of()
    spans = request_spans(7)
    add(ring, *spans[:-1])
    assert not ended
    found = ring.search("req-000007", "", "", 10)
    assert len(found) == 1 and not found[0].summary.ended
    add(ring, spans[-1], spans[-1], spans[0])
    assert len(ended) == 1 and ended[0].summary.ended


def test_a_root_below_a_clients_span_is_a_root() -> None:
    ring, ended = ring_of()
    spans = request_spans(7)
    spans[-1].parent_span_id = b"\x09" * 8
    add(ring, *spans)
    assert len(ended) == 1
    assert [(span.name, depth) for span, depth in in_tree_order(ended[0].spans.values())] == [
        ("chat m", 0), ("route", 1), ("queue", 2), ("prefill", 1), ("decode", 1),
    ]  # fmt: skip


def test_the_ring_is_bounded_and_keeps_failed_ones_longer() -> None:
    ring, _ = ring_of(size=4, kept=2)
    for n in range(1, 4):
        add(ring, *request_spans(n, error="worker_lost"))
    for n in range(4, 20):
        add(ring, *request_spans(n))
    assert len(ring) == 6
    failed = [trace.summary.request_id for trace in ring.search("", "", "failed", 10)]
    assert failed == ["req-000003", "req-000002"]
    assert ring.find("req-000004") is None
    assert ring.find("req-000019") is not None


def test_slow_is_later_than_its_contemporaries_or_than_its_slo() -> None:
    ring, _ = ring_of(size=100, slos={"chat": Slo(ttft_s=0.5)})
    for n in range(1, 31):
        add(ring, *request_spans(n, ttft_s=0.05 + n / 1e4))
    add(ring, *request_spans(40, ttft_s=0.3))
    add(ring, *request_spans(41, ttft_s=0.7))
    add(ring, *request_spans(42, ttft_s=0.05))
    slow = {trace.summary.request_id: trace.summary.slo_met for trace in ring.search("", "", "slow", 100)}
    assert slow["req-000040"] is True and slow["req-000041"] is False
    assert "req-000042" not in slow


def test_search_by_id_tenant_and_the_beginning_of_an_id() -> None:
    ring, _ = ring_of()
    add(ring, *request_spans(7))
    add(ring, *request_spans(8))
    assert [t.summary.request_id for t in ring.search("000007", "", "", 10)] == ["req-000007"]
    assert len(ring.search("", "acme", "", 10)) == 2
    assert not ring.search("", "nobody", "", 10)
    assert ring.search("", "", "", 1)[0].summary.request_id == "req-000008"
    for wanted in ("req-000007", "req-0000", f"{7:032x}"):
        assert ring.find(wanted) is not None
    assert ring.find("req-") is None and ring.find("") is None


def test_a_trace_of_too_many_spans_says_how_many_it_left_out() -> None:
    ring, _ = ring_of()
    add(ring, *(otlp(7, n, 1, "decode", 0, 1) for n in range(2, MAX_SPANS + 12)))
    found = ring.find(f"{7:032x}")
    assert found is not None
    assert (len(found.spans), found.dropped) == (MAX_SPANS, 10)


def test_hostile_spans_are_cut_or_left_out() -> None:
    long = otlp(7, 1, 0, "x" * 9999, 5, 1, REASON="y" * 99_999)
    long.attributes.extend([long.attributes[0]] * 3)
    nameless = trace_pb2.Span(trace_id=b"short", span_id=b"1", end_time_unix_nano=5)
    spans = list(spans_of(export(long, nameless)))
    assert len(spans) == 1
    assert len(spans[0].name) == 256 and len(spans[0].text("tandem.reason")) == console_spans.MAX_TEXT
    assert spans[0].duration_s == 0.0


def test_a_placement_in_words() -> None:
    route = as_spans(*request_spans(7))[0]
    assert in_words(route) == [
        "decode-2: 1,024 of 1,312 tokens cached, predicted 41 ms; decode-1 would have been 118 ms.",
        "3 plans were scored; the best 2 are listed.",
        "Not considered, draining: decode-3.",
    ]


def test_a_placement_whose_first_token_would_have_been_sooner_elsewhere_says_why() -> None:
    spans = request_spans(7)
    for attribute in spans[0].attributes:
        if attribute.key.endswith(".ttft_ms"):
            attribute.value.array_value.values[1].double_value = 12.0
    words = in_words(as_spans(*spans)[0])
    assert words[1] == (
        "decode-1 would have had the first token sooner, but decode-2 costs less in all: "
        "6.0 ms per token instead of 7.0."
    )


def events_of(span: trace_pb2.Span, *events: tuple[str, float, dict[str, str]]) -> None:
    for name, at_ms, attributes in events:
        span.events.add(name=name, time_unix_nano=int((10_000 + at_ms) * MS), attributes=pairs(attributes))


def test_where_the_time_went_is_told_against_what_was_predicted() -> None:
    spans = request_spans(1, ttft_s=0.1)
    by_name = {span.name: span for span in spans}
    by_name["prefill"].attributes.extend(pairs({names.COMPUTED_TOKENS: 800, names.PREDICTED_CACHED: 1200}))
    predicted = {names.PREDICTED_TTFT: 43.0, names.PREDICTED_PREFILL: 30.0, names.PREDICTED_ITL: 4.0}
    by_name["route"].attributes.extend(pairs(predicted))
    engine = otlp(1, 9, 1, "llm_request", 5, 200)
    engine.attributes.extend(pairs({"gen_ai.latency.time_in_queue": 0.02}))
    spans.append(engine)
    events_of(by_name["decode"], ("first_token", 45, {}))
    events_of(by_name["chat m"], ("first_token", 100, {}))
    assert where_time_went.in_words(as_spans(*spans)) == [
        "First token after 100 ms, 57 ms later than predicted.",
        "Of these, the longest first: between spans, on the way or in a busy process, 57 ms; "
        "prefill on decode-2 36 ms (20 ms of it in the engine's queue, 800 tokens computed, "
        "1,024 were cached instead of 1,200, predicted 30 ms); first step on decode-2 5.0 ms.",
        "Then 6.5 ms per token (predicted 4.0 ms).",
    ]


def test_where_the_time_went_of_an_attempt_that_was_lost_and_a_wait() -> None:
    spans = request_spans(1, ttft_s=0.4)
    root = next(span for span in spans if span.name == "chat m")
    lost = {names.WORKER: "decode-1", names.REASON: "its worker died"}
    events_of(root, ("attempt_failed", 300, lost), ("retry", 301, {}), ("first_token", 400, {}))
    key: dict[str, Given] = {"REQUEST_ID": "req-000001", "ATTEMPT": 1, "CHOICE": 0}
    spans.append(otlp(1, 12, 1, "route", 301, 391, **key, INDEX_MS=1.0))
    spans.append(otlp(1, 13, 12, "queue", 311, 391, **key, QUEUE_REASON="room", QUEUE_AHEAD=7))
    (_, parts, _) = where_time_went.in_words(as_spans(*spans))
    assert parts.startswith(
        "Of these, the longest first: attempt 1 on decode-1, which was lost, 300 ms (its worker died); waiting in the "
        f"router 80 ms ({names.QUEUE_REASONS['room']}, 7 waited already)"
    )


def test_nothing_is_said_of_the_time_before_the_root_is_here() -> None:
    assert where_time_went.in_words(as_spans(*request_spans(1)[:-1])) == []


def test_the_view_of_a_trace_is_plain_data() -> None:
    ring, _ = ring_of()
    add(ring, *request_spans(7))
    found = ring.find("req-000007")
    assert found is not None
    data = json.loads(json.dumps(whole(found)))
    assert [span["name"] for span in data["tree"]] == ["chat m", "route", "queue", "prefill", "decode"]
    assert data["placements"][0]["candidates"][0]["terms"]["itl_ms"] == 6.0
    assert data["tree"][0]["begin_ms"] == 0.0 and data["tree"][3]["end_ms"] == 40.0


def test_the_chrome_trace_has_every_span_and_nests_on_each_thread() -> None:
    spans = as_spans(*request_spans(7), otlp(7, 9, 1, "overlaps", 30, 300))
    data = json.loads(json.dumps(chrome_trace(spans)))
    drawn = [event for event in data["traceEvents"] if event["ph"] == "X"]
    assert {event["name"] for event in drawn} == {"chat m", "route", "queue", "prefill", "decode", "overlaps"}
    assert min(event["ts"] for event in drawn) == 0.0
    for tid in {event["tid"] for event in drawn}:
        open_until: list[float] = []
        for event in sorted((e for e in drawn if e["tid"] == tid), key=lambda e: (e["ts"], -e["dur"])):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1], event["name"]
            open_until.append(event["ts"] + event["dur"])


def test_the_slowest_since_some_time() -> None:
    ring, _ = ring_of()
    for n, ttft_s in enumerate((0.2, 0.9, 0.4), 1):
        add(ring, *request_spans(n, ttft_s=ttft_s))
    add(ring, *request_spans(9, error="overloaded")[:-1])  # has not ended
    assert [t.summary.request_id for t in ring.slowest(0, 2)] == ["req-000002", "req-000003"]
    assert not ring.slowest(1e30, 10)
