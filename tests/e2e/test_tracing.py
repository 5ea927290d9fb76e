"""vLLM's own span of a request lies within our trace of it: on the prefill worker, and on the decode worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tandem.models.prepare import prepare_smollm2
from tests.harness.cluster import Cluster
from tests.harness.otlp import OtlpReceiver

MODEL = "SmolLM2-135M-Instruct"
ROOT = f"chat {MODEL}"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def cluster(receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    engine_args = {"kv_cache_memory_bytes": 256 << 20}
    deployment: dict[str, Any] = {
        "models": [
            {
                "name": MODEL,
                "path": str(prepare_smollm2()),
                "pools": [
                    {"role": "prefill", "engine_args": engine_args},
                    {"role": "decode", "engine_args": engine_args},
                ],
            }
        ],
        "policy": {"local_prefill": False},
    }
    # Of this variable vLLM's core would make an exporter itself.
    env = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
    }
    with Cluster(deployment, tmp_path_factory.mktemp("cluster"), env=env).start(180) as made:
        yield made


def ask(cluster: Cluster, max_tokens: int, **headers: str) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell me about the sea. " * 20}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
    answer: dict[str, Any] = (
        httpx.post(cluster.url + "/v1/chat/completions", json=body, headers=headers, timeout=120)
        .raise_for_status()
        .json()
    )
    return answer


def test_llm_request_lies_under_ours(cluster: Cluster, receiver: OtlpReceiver) -> None:
    answer = ask(cluster, 8)
    phases = ["tokenize", "route", "queue", "prefill", "kv_transfer", "decode"]
    trace = receiver.wait_for(answer["id"], [ROOT, *phases, "llm_request", "llm_request"], timeout_s=60)
    assert sorted(span.name for span in trace) == sorted([ROOT, *phases, "llm_request", "llm_request"])
    by_id = {span.span_id: span for span in trace}
    theirs = {span.service: span for span in trace if span.name == "llm_request"}
    ours = {span.name: span for span in trace if span.scope == "tandem"}
    assert by_id[theirs["tandem-prefill"].parent_id] is ours["prefill"]
    assert by_id[theirs["tandem-decode"].parent_id] is ours[ROOT]
    assert theirs["tandem-prefill"].instance == "prefill-1" and theirs["tandem-decode"].instance == "decode-1"

    prefill, decode = theirs["tandem-prefill"].attributes, theirs["tandem-decode"].attributes
    assert prefill["gen_ai.usage.prompt_tokens"] == decode["gen_ai.usage.prompt_tokens"]
    assert decode["gen_ai.usage.prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert (prefill["gen_ai.usage.completion_tokens"], decode["gen_ai.usage.completion_tokens"]) == (1, 8)
    # One clock each: vLLM's part lies within ours.
    slack_ns = 50_000_000
    for span, first, last in (
        (theirs["tandem-prefill"], ours["prefill"], ours["prefill"]),
        (theirs["tandem-decode"], ours["kv_transfer"], ours["decode"]),
    ):
        assert first.start_ns - slack_ns <= span.start_ns and span.end_ns <= last.end_ns + slack_ns

    transfer = ours["kv_transfer"].attributes
    assert transfer["tandem.kv.bytes"] > 0 and transfer["tandem.kv.pull_ms"] > 0
    assert "sea" not in str([span.attributes for span in trace])


def test_nothing_is_sent_of_what_is_not_sampled(cluster: Cluster, receiver: OtlpReceiver) -> None:
    quiet = "fe" * 16
    ask(cluster, 4, traceparent=f"00-{quiet}-{'01' * 8}-00")
    receiver.wait_for(ask(cluster, 4)["id"], [ROOT, "llm_request", "llm_request"], timeout_s=60)
    assert [span.name for span in receiver.spans() if span.trace_id == quiet] == []
    known = {span.trace_id for span in receiver.spans() if span.name == ROOT}
    assert {span.trace_id for span in receiver.spans()} == known, "no span outside of a request's trace"
