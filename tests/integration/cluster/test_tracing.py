"""Traces of a cluster of simulated engines, as a collector gets them over OTLP."""

from __future__ import annotations

import itertools
import json
import secrets
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tandem.telemetry import spans as table
from tandem.v1 import inference_pb2
from tests.harness.answers import MODEL
from tests.harness.client import Client, describe
from tests.harness.cluster import wait_for
from tests.harness.otlp import OtlpReceiver, Span
from tests.harness.site import Site, deployment
from tests.integration.cluster.conftest import START_S

pytestmark = pytest.mark.timeout(180)

#: A client's own decisions.
SAMPLED, NOT_SAMPLED = "01", "00"
REMOTE = ["tokenize", "route", "queue", "prefill", "kv_transfer", "decode", f"chat {MODEL}"]
BY_NAME = {span.name: span for span in table.SPANS}
#: Between two processes of one machine, and between a float of seconds and nanoseconds.
JITTER_NS = 5_000_000


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def site(receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    wanted = deployment()
    wanted["classes"] = [
        {"name": "interactive"},
        {"name": "hasty", "timeout_s": 1.0},
        {"name": "eager", "ttft_slo_s": 0.001, "best_effort": True},
    ]
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_TRACES_SAMPLER": "parentbased_always_on"}
    site = Site(wanted, tmp_path_factory.mktemp("traced"), env=env)
    site.start(START_S)
    try:
        yield site
    finally:
        site.stop()


def chat(site: Site, words: str, *, flags: str = "", max_tokens: int = 8, **more: Any) -> tuple[str, httpx.Response]:
    """(id of the client's trace, the response). Without ``flags`` the client sends no context."""
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace_id}-{'ab' * 8}-{flags}"} if flags else {}
    body = {"model": MODEL, "messages": [{"role": "user", "content": words}], "max_tokens": max_tokens, **more}
    body.setdefault("ignore_eos", True)
    return trace_id, httpx.post(site.url + "/v1/chat/completions", json=body, headers=headers, timeout=30)


def one(trace: list[Span], name: str) -> Span:
    (found,) = [span for span in trace if span.name == name]
    return found


def check_against_the_table(trace: list[Span]) -> None:
    for span in trace:
        row = BY_NAME.get(span.name) or table.CHAT
        unknown = set(span.attributes) - row.allowed
        assert not unknown, f"{span.name} has {unknown}"
        if not span.failed and not span.attributes.get(table.RECONSTRUCTED):
            lacking = set(row.always) - set(span.attributes)
            assert not lacking, f"{span.name} lacks {lacking}"
        known = {event.name: set(event.attributes) for event in row.events}
        for event in span.events:
            assert set(event.attributes) <= known[event.name], f"{span.name}: {event}"


def check_connected(trace: list[Span]) -> Span:
    """One trace, one root, and every other span below it. Returns the root."""
    assert len({span.trace_id for span in trace}) == 1
    by_id = {span.span_id: span for span in trace}
    assert len(by_id) == len(trace)
    roots = [span for span in trace if span.parent_id not in by_id]
    assert [root.name for root in roots] == [f"chat {MODEL}"]
    for span in trace:
        assert span.start_ns <= span.end_ns
        assert span.scope == "tandem"
    return roots[0]


def test_a_disaggregated_request_is_one_trace(site: Site, receiver: OtlpReceiver) -> None:
    words = "what a trace must not hold: " + " ".join(secrets.token_hex(4) for _ in range(60))
    began_ns = time.time_ns()
    _, response = chat(site, words, max_tokens=12)
    ended_ns = time.time_ns()
    answer = response.raise_for_status().json()
    trace = receiver.wait_for(answer["id"], REMOTE)

    root = check_connected(trace)
    check_against_the_table(trace)
    assert sorted(span.name for span in trace) == sorted(REMOTE), "each once"
    assert not [span for span in trace if span.failed]
    tokenize, route, queue, prefill, transfer, decode = (one(trace, name) for name in REMOTE[:-1])
    below = {span.name: span.parent_id for span in trace}
    assert root.parent_id == "" and queue.parent_id == route.span_id
    assert {below[s.name] for s in (tokenize, route, prefill, transfer, decode)} == {root.span_id}
    services = {span.name: (span.service, span.instance) for span in (root, route, prefill, transfer, decode)}
    assert services[root.name][0] == "tandem-frontend" and tokenize.service == "tandem-frontend"
    assert services["route"] == ("tandem-router", "router")
    # Workers that decode prefill for others, too.
    assert services["prefill"][1] == route.attributes["tandem.prefill.worker"] != decode.instance
    assert services["decode"] == services["kv_transfer"]
    assert services["decode"][0] == "tandem-decode"

    # One machine, one clock: the phases follow each other within the request.
    assert began_ns - JITTER_NS <= root.start_ns and root.end_ns <= ended_ns + JITTER_NS
    phases = [tokenize, route, prefill, transfer, decode]
    for before, after in itertools.pairwise(phases):
        assert before.end_ns <= after.start_ns + JITTER_NS, f"{after.name} begins before {before.name} ends"
    for span in trace:
        assert root.start_ns - JITTER_NS <= span.start_ns and span.end_ns <= root.end_ns + JITTER_NS, span.name
    assert route.start_ns <= queue.start_ns and queue.end_ns <= route.end_ns
    assert transfer.end_ns == decode.start_ns, "the decode worker's part has no gap"

    usage = answer["usage"]
    assert root.kind == 2, "SERVER"
    assert root.attributes["gen_ai.operation.name"] == "chat"
    assert root.attributes["gen_ai.request.model"] == MODEL
    assert root.attributes["gen_ai.response.id"] == answer["id"]
    assert root.attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert root.attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 12
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert 0 < root.attributes["gen_ai.response.time_to_first_chunk"] < (ended_ns - began_ns) / 1e9
    assert root.attributes["tandem.attempts"] == 1
    assert [event.name for event in root.events] == ["placed", "first_token"]

    check_placement(route, prefill.instance, decode.instance)
    assert queue.attributes["tandem.queue.reason"] in table.QUEUE_REASONS
    cached = prefill.attributes["gen_ai.usage.cache_read.input_tokens"]
    computed = prefill.attributes["tandem.computed_tokens"]
    assert cached + computed == usage["prompt_tokens"] and computed > 0
    assert transfer.attributes["tandem.kv.bytes"] > 0 and transfer.attributes["tandem.kv.source"] == prefill.instance
    assert 0 < transfer.attributes["tandem.kv.pull_ms"] <= (transfer.end_ns - transfer.start_ns) / 1e6 + 1
    assert decode.attributes["gen_ai.usage.output_tokens"] == 12
    itl = [decode.attributes[f"tandem.itl_{which}_ms"] for which in ("p50", "p90", "p99", "max")]
    assert itl == sorted(itl) and itl[0] > 5, "steps of 20 ms"

    secret = words.split()[-1]
    assert secret not in str(receiver.spans()), "no text of a prompt is in a span"


def check_placement(route: Span, prefill_worker: str, decode_worker: str) -> None:
    about = route.attributes
    assert (about["tandem.leg"], about["tandem.prefill.worker"]) == ("prefill", prefill_worker)
    assert about["tandem.decode.worker"] == decode_worker
    candidates = about["tandem.candidates.decode_worker"]
    assert set(candidates) >= {"decode-1", "decode-2"} and about["tandem.route.num_candidates"] == len(candidates)
    for term in table.CANDIDATE_TERMS.values():
        assert len(about[term]) == len(candidates), term
    chosen = about["tandem.candidates.chosen"]
    assert candidates[chosen] == decode_worker
    assert about["tandem.candidates.prefill_worker"][chosen] == prefill_worker
    assert about["tandem.candidates.score"][chosen] == min(about["tandem.candidates.score"])
    assert about["tandem.candidates.ttft_ms"][chosen] == about["tandem.route.predicted_ttft_ms"] > 0
    assert decode_worker in about["tandem.route.summary"]


def test_the_trace_of_a_client_goes_on(site: Site, receiver: OtlpReceiver) -> None:
    trace_id, response = chat(site, "hello", flags=SAMPLED)
    trace = receiver.wait_for(response.raise_for_status().json()["id"], REMOTE)
    assert {span.trace_id for span in trace} == {trace_id}
    root = check_connected(trace)
    assert root.parent_id == "ab" * 8

    client = Client(site.grpc, MODEL)
    trace_id = secrets.token_hex(16)
    request = inference_pb2.ChatRequest(model=MODEL, messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    request.options.max_tokens = 3
    metadata = [("traceparent", f"00-{trace_id}-{'cd' * 8}-{SAMPLED}")]
    answers = list(client._stub.Chat(request, timeout=30, metadata=metadata))
    client.close()
    root = check_connected(receiver.wait_for(answers[-1].id, REMOTE))
    assert (root.trace_id, root.parent_id) == (trace_id, "cd" * 8)


def test_what_a_client_does_not_sample_is_not_traced(site: Site, receiver: OtlpReceiver) -> None:
    _, response = chat(site, "nobody looks", flags=NOT_SAMPLED)
    quiet = response.raise_for_status().json()["id"]
    _, response = chat(site, "somebody looks", flags=SAMPLED)
    receiver.wait_for(response.json()["id"], REMOTE)
    assert receiver.of_request(quiet) == []


def test_a_failed_request_is_traced_after_the_fact(site: Site, receiver: OtlpReceiver) -> None:
    trace_id, response = chat(site, "too long for its class", flags=NOT_SAMPLED, max_tokens=2000, request_class="hasty")
    assert response.status_code == 504 and response.json()["error"]["code"] == "request_timeout"
    (root,) = [s for s in _of_trace(receiver, trace_id, 3) if s.name == f"chat {MODEL}"]
    trace = receiver.of_request(root.attributes["tandem.request.id"])
    check_connected(trace)
    check_against_the_table(trace)
    assert root.failed and root.attributes["error.type"] == "request_timeout"
    assert root.attributes["tandem.trace.why"] == "failed"
    assert 0.9 < (root.end_ns - root.start_ns) / 1e9 < 10
    assert {span.service for span in trace} == {"tandem-frontend"}
    assert one(trace, "queue").attributes["tandem.reconstructed"] is True


def test_a_slow_request_is_traced_after_the_fact(site: Site, receiver: OtlpReceiver) -> None:
    words = " ".join(secrets.token_hex(3) for _ in range(100))
    trace_id, response = chat(site, words, flags=NOT_SAMPLED, max_tokens=20, request_class="eager")
    answer = response.raise_for_status().json()
    trace = receiver.wait_for(answer["id"], ["tokenize", "queue", "prefill", "kv_transfer", "decode", f"chat {MODEL}"])
    root = check_connected(trace)
    check_against_the_table(trace)
    assert root.trace_id == trace_id and root.attributes["tandem.trace.why"] == "slow" and not root.failed
    assert {span.service for span in trace} == {"tandem-frontend"}, "one clock"
    queue, prefill, transfer, decode = (one(trace, n) for n in ("queue", "prefill", "kv_transfer", "decode"))
    for before, after in ((queue, prefill), (prefill, transfer), (transfer, decode)):
        assert after.attributes["tandem.reconstructed"] is True
        assert before.end_ns <= after.start_ns + 20 * JITTER_NS
    assert prefill.attributes["tandem.worker"] == transfer.attributes["tandem.kv.source"]
    assert transfer.attributes["tandem.kv.source"] != decode.attributes["tandem.worker"]
    assert transfer.attributes["tandem.kv.bytes"] > 0
    assert prefill.attributes["tandem.computed_tokens"] > 0
    assert decode.attributes["gen_ai.usage.output_tokens"] == 20
    assert (decode.end_ns - decode.start_ns) / 1e9 > 0.2, "20 steps of 20 ms"


def test_a_lost_worker_shows_as_a_migration(site: Site, receiver: OtlpReceiver) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "and on and on"}],
        "max_tokens": 150,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    request_id = ""
    with httpx.stream("POST", site.url + "/v1/chat/completions", json=body, timeout=60) as response:
        given = 0
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            request_id = event["id"]
            given += bool(event["choices"] and event["choices"][0]["delta"].get("content"))
            if given == 10:
                holder = _holder(site)
                pid = site.signal(holder, signal.SIGKILL)
                given += 1
    trace = receiver.wait_for(request_id, [*REMOTE, "route", "prefill"])
    root = check_connected(trace)
    check_against_the_table(trace)
    assert not root.failed and root.attributes["tandem.attempts"] == 2
    (failure,), (migration,) = root.events_of("attempt_failed"), root.events_of("migration")
    assert failure.attributes["tandem.worker"] == holder and failure.attributes["error.type"] == "worker_lost"
    assert failure.at_ns <= migration.at_ns
    assert migration.attributes["tandem.attempt"] == 1
    assert migration.attributes["tandem.tokens_so_far"] >= 10
    routes = [span.attributes for span in trace if span.name == "route"]
    placed_on = {about["tandem.attempt"]: about["tandem.decode.worker"] for about in routes}
    assert placed_on[0] == holder and placed_on[1]  # elsewhere, unless the other one is silent just then
    (decode,) = [span for span in trace if span.name == "decode"]  # the other one died with its worker
    assert decode.attributes["tandem.attempt"] == 1
    site.wait_restarted(holder, pid, 30.0)


def _holder(site: Site) -> str:
    """The decode worker that runs the one request there is."""
    (found,) = [w["name"] for w in site.processes("decode") if describe(w["grpc"]).load.running_requests]
    return str(found)


def _of_trace(receiver: OtlpReceiver, trace_id: str, least: int) -> list[Span]:
    def there() -> list[Span]:
        found = [span for span in receiver.spans() if span.trace_id == trace_id]
        return found if len(found) >= least else []

    found: list[Span] = wait_for(there, 30, f"{least} spans of trace {trace_id}")
    return found
