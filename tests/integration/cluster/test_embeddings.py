"""Embeddings through a whole cluster of simulated engines, beside a model that makes text."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.protobuf import json_format

from tandem.enginemodel.content import hashed_embedding
from tandem.v1 import inference_pb2, inference_pb2_grpc, router_pb2, router_pb2_grpc
from tests.harness.answers import MODEL
from tests.harness.client import describe
from tests.harness.cluster import wait_for
from tests.harness.site import SIM, Site
from tests.integration.cluster.conftest import _running

EMBED = "embedder"
MAX_LEN, SIZE = 256, 48
TEXTS = ["the cat sat on the mat", "the cat sat on a mat", "quarterly revenue fell"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pool = {"role": "aggregated", "engine": "sim", "engine_args": {**SIM, "embedding_size": SIZE}}
    shared: dict[str, Any] = {"path": MODEL, "max_model_len": MAX_LEN}
    models = [
        {"name": EMBED, "task": "embed", "pools": [{**pool, "replicas": 2}], **shared},
        {"name": MODEL, "pools": [pool], **shared},
    ]
    yield from _running(tmp_path_factory.mktemp("embed"), {"models": models})


@pytest.fixture
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=site.url + "/v1", api_key="x", max_retries=0, timeout=30) as client:
        yield client


def test_one_vector_per_input_in_order(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=EMBED, input=TEXTS)  # asks for base64
    assert [one.index for one in answer.data] == [0, 1, 2]
    first, second, third = (one.embedding for one in answer.data)
    assert len(first) == SIZE and math.isclose(math.hypot(*first), 1.0, abs_tol=1e-5)
    assert _dot(first, second) > _dot(first, third)
    plain = client.embeddings.create(model=EMBED, input=TEXTS[1], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(second)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > plain.usage.prompt_tokens > 0


def _dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_token_ids_and_truncation(client: openai.OpenAI) -> None:
    ids = list(range(300, 300 + MAX_LEN))
    whole = client.embeddings.create(model=EMBED, input=ids)
    assert whole.data[0].embedding == pytest.approx(list(array("f", hashed_embedding(ids, SIZE))))
    cut = client.embeddings.create(model=EMBED, input=[[*ids, 5, 6, 7]], extra_body={"truncate_prompt_tokens": -1})
    assert cut.data[0].embedding == pytest.approx(whole.data[0].embedding)
    text = client.embeddings.create(model=EMBED, input="hello " * 999, extra_body={"truncate_prompt_tokens": 9})
    assert text.usage.prompt_tokens == 9


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        ({"input": []}, "invalid_request", "empty"),
        ({"input": ""}, "invalid_request", "empty"),
        ({"input": ["fine", ""]}, "invalid_request", "empty"),
        ({"input": [1, "a"]}, "invalid_request", "must be a string"),
        ({"input": [[1, 2**31]]}, "invalid_request", "outside the vocabulary"),
        ({"input": [[1]] * 2049}, "invalid_request", "2048"),
        ({"input": "a", "dimensions": 7}, "invalid_request", "48 values"),
        ({"input": "a", "temperature": 1}, "invalid_request", "temperature"),
        ({"input": "a " * 9999}, "context_length_exceeded", "256 tokens"),
        ({"input": [[7] * (MAX_LEN + 1)]}, "context_length_exceeded", "257 tokens"),
        ({"input": "a", "model": MODEL}, "invalid_request", "makes text"),
        ({"input": "a", "model": "nobody"}, "model_not_found", "nobody"),
        ({"input": "a", "request_class": "none"}, "invalid_request", "request_class"),
    ],
)
def test_what_is_wrong_is_said(client: openai.OpenAI, wrong: dict[str, Any], code: str, says: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.post("/embeddings", body={"model": EMBED, **wrong}, cast_to=object)
    assert refused.value.status_code in (400, 404)
    assert refused.value.code == code and says in refused.value.message


def test_an_embedder_makes_no_text(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes embeddings"):
        client.chat.completions.create(model=EMBED, messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="makes embeddings"):
        client.completions.create(model=EMBED, prompt="hi")
    assert client.completions.create(model=MODEL, prompt="hi", max_tokens=2).choices[0].text


def test_grpc(site: Site, client: openai.OpenAI) -> None:
    inputs = [inference_pb2.EmbedInput(text=text) for text in TEXTS]
    inputs.append(inference_pb2.EmbedInput(token_ids=inference_pb2.TokenIds(ids=[5, 6])))
    with grpc.insecure_channel(site.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        answer = stub.Embed(inference_pb2.EmbedRequest(model=EMBED, inputs=inputs), timeout=30)
        over_http = client.embeddings.create(model=EMBED, input=TEXTS)
        for ours, theirs in zip(answer.embeddings, over_http.data, strict=False):
            assert list(ours.values) == pytest.approx(theirs.embedding)
        assert len(answer.embeddings) == 4 and answer.usage.prompt_tokens == over_http.usage.prompt_tokens + 2
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(inference_pb2.EmbedRequest(model=EMBED), timeout=30)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_the_readmes_call_works(site: Site) -> None:
    readme = (Path(__file__).parents[3] / "services" / "frontend" / "README.md").read_text()
    (body,) = re.findall(r"grpcurl -plaintext -d '(.+)' localhost:9000 tandem\.v1\.InferenceService/Embed", readme)
    request = json_format.Parse(body.replace('"EMBEDDER"', f'"{EMBED}"'), inference_pb2.EmbedRequest())
    with grpc.insecure_channel(site.grpc) as channel:
        assert len(inference_pb2_grpc.InferenceServiceStub(channel).Embed(request, timeout=30).embeddings) == 2


def test_many_at_once_while_a_worker_dies(site: Site, client: openai.OpenAI) -> None:
    def ask(number: int) -> bool:
        ids = [[1000 + number, 2000 + i] for i in range(64)]
        answer = client.embeddings.create(model=EMBED, input=ids)
        return all(
            one.embedding == pytest.approx(list(array("f", hashed_embedding(two, SIZE))))
            for one, two in zip(answer.data, ids, strict=True)
        )

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, number) for number in range(24)]
        time.sleep(0.2)
        killed = site.signal(f"{EMBED}-aggregated-1", signal.SIGKILL)
        assert all(answer.result(timeout=60) for answer in answers)
    site.wait_restarted(f"{EMBED}-aggregated-1", killed, 60)


def test_a_client_that_goes_away_ends_its_inputs(site: Site) -> None:
    body = json.dumps({"model": EMBED, "input": [[9, 9, i] * 60 for i in range(2000)]}).encode()
    with socket.create_connection(("127.0.0.1", site.http_port)) as connection:
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(0.5)
    wait_for(lambda: not _left(site), 30, "nothing left of it")


def _left(site: Site) -> list[str]:
    embedders = [worker for worker in site.processes("decode") if worker["name"].startswith(EMBED)]
    assert len(embedders) == 2
    found = [one["name"] for one in embedders if describe(one["grpc"]).load.running_requests]
    with grpc.insecure_channel(site.processes("router")[0]["grpc"]) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        known = stub.GetAccounting(router_pb2.GetAccountingRequest(model=EMBED), timeout=5)
    return found + (["router"] if known.queued or known.in_flight or known.kept else [])
