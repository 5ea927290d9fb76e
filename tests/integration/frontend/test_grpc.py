"""tandem.v1.InferenceService through the client in examples/, health and reflection."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from examples.grpc_client import TandemClient
from tandem import errors
from tandem.adapters.deployment import Limits
from tandem.adapters.grpc_errors import error_of
from tandem.core.blocks import token_ids
from tandem.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from tests.integration.frontend.conftest import MODEL, Site, StartSite

TEXT = "Grüße 👩‍👩‍👧!"


@pytest.fixture
async def client(site: Site) -> AsyncIterator[TandemClient]:
    async with TandemClient(f"127.0.0.1:{site.frontend.grpc_port}") as client:
        yield client


async def test_generate_by_text_and_by_token_ids(site: Site, client: TandemClient) -> None:
    site.answer(TEXT)
    for prompt in ("abc", site.ids("abc")):
        answer = [response async for response in client.generate(MODEL, prompt, temperature=0.0, stop=["?"])]
        assert "".join(response.text for response in answer) == TEXT
        assert [token for response in answer for token in response.token_ids] == [*site.ids(TEXT), 2]
        last = answer[-1]
        assert last.finish_reason == types_pb2.FINISH_REASON_STOP
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
            len(site.ids("abc")),
            len(site.ids(TEXT)) + 1,
        )
        assert last.usage.cached_tokens == min(4, len(site.ids("abc")))
        assert not any(response.HasField("usage") for response in answer[:-1])
    submit = site.cluster.submits[-1]
    assert list(token_ids(submit.prompt)) == site.ids("abc")
    assert submit.sampling.temperature == 0.0


async def test_chat(site: Site, client: TandemClient) -> None:
    site.answer(TEXT)
    pieces = [piece async for piece in client.chat(MODEL, [("user", "hello")], max_tokens=50)]
    assert "".join(pieces) == TEXT
    assert "<|im_start|>user\nhello" in site.tokenizer.decode(
        token_ids(site.cluster.submits[0].prompt), skip_special_tokens=False
    )


async def test_models(client: TandemClient) -> None:
    assert [(model.name, model.max_model_len) for model in await client.models()] == [(MODEL, 512)]


@pytest.mark.parametrize(
    ("model", "prompt", "options", "error"),
    [
        ("other", "x", {}, errors.UnknownModel),
        (MODEL, "x", {"temperature": 3.0}, errors.InvalidRequest),
        (MODEL, [], {}, errors.InvalidRequest),
        (MODEL, [4_000_000], {}, errors.InvalidRequest),
        (MODEL, "x" * 600, {}, errors.ContextLengthExceeded),
    ],
)
async def test_refusals_keep_their_class(
    client: TandemClient,
    model: str,
    prompt: str | list[int],
    options: dict[str, float],
    error: type[errors.TandemError],
) -> None:
    with pytest.raises(error):
        async for _ in client.generate(model, prompt, **options):
            pass


async def test_refusals_of_the_cluster(site: Site, client: TandemClient) -> None:
    site.cluster.refusal = errors.Overloaded("full", retry_after_s=2.0)
    with pytest.raises(errors.Overloaded) as caught:
        async for _ in client.generate(MODEL, "x"):
            pass
    assert caught.value.retry_after_s == 2.0


async def test_cancel_ends_the_request(site: Site) -> None:
    site.cluster.script = lambda submit: site.ids("x") * 100_000
    async with grpc.aio.insecure_channel(f"127.0.0.1:{site.frontend.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(model=MODEL, text="x"), timeout=30.0)
        async for _ in call:
            break
        call.cancel()
        await site.until(lambda: site.cluster.aborts and not site.cluster.running)
    await site.until(lambda: len(site.frontend.generations) == 0)


async def test_a_deadline_is_the_requests_deadline(site: Site) -> None:
    site.cluster.holding = True
    async with grpc.aio.insecure_channel(f"127.0.0.1:{site.frontend.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(inference_pb2.GenerateRequest(model=MODEL, text="x"), timeout=1.0):
                pass
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert isinstance(error_of(caught.value), errors.TimedOut)
    assert site.cluster.submits[0].timeout_ms <= 1000
    await site.until(lambda: site.cluster.aborts and site.frontend.cluster.in_flight == 0)


async def test_keys(start_site: StartSite) -> None:
    async with start_site(tenants=True) as site:
        site.answer("x")
        async with TandemClient(f"127.0.0.1:{site.frontend.grpc_port}", api_key="sk-test") as client:
            assert [response.text async for response in client.generate(MODEL, "a")]
        assert site.cluster.submits[0].tenant == "t1"
        async with TandemClient(f"127.0.0.1:{site.frontend.grpc_port}") as client:
            with pytest.raises(errors.Unauthenticated):
                await client.models()


async def test_health_and_reflection(site: Site) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{site.frontend.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tandem.v1.InferenceService"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10.0)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def questions() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        async with asyncio.timeout(10.0):
            async for answer in stub.ServerReflectionInfo(questions()):
                names = {service.name for service in answer.list_services_response.service}
                assert "tandem.v1.InferenceService" in names
                break


async def test_messages_may_be_compressed_and_have_a_limit(start_site: StartSite) -> None:
    async with (
        start_site(limits=Limits(max_body_bytes=20_000)) as site,
        grpc.aio.insecure_channel(f"127.0.0.1:{site.frontend.grpc_port}") as channel,
    ):
        site.answer("fine")
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def said(text: str, compression: grpc.Compression) -> str:
            request = inference_pb2.GenerateRequest(model=MODEL, text=text)
            call = stub.Generate(request, timeout=20.0, compression=compression)
            return "".join([response.text async for response in call])

        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
            assert await said("a fox " * 30, compression) == "fine"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await said("x" * 30_000, compression)  # compressed it would do
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(error_of(caught.value), errors.PayloadTooLarge)


async def test_reasoning_is_told_apart(start_site: StartSite) -> None:
    async with (
        start_site(model={"reasoning_parser": "think"}) as site,
        grpc.aio.insecure_channel(f"127.0.0.1:{site.frontend.grpc_port}") as channel,
    ):
        site.answer("<think>Hm.</think>Yes.")
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.ChatRequest(model=MODEL, messages=[inference_pb2.ChatMessage(role="user", content="q")])
        answer = [response async for response in stub.Chat(request, timeout=20.0)]
        assert "".join(response.reasoning for response in answer) == "Hm."
        assert "".join(response.text for response in answer) == "Yes."


README = Path(__file__).parents[3] / "services" / "frontend" / "README.md"
LINE = r"^    grpcurl -plaintext -d '(.+)' localhost:9000 tandem\.v1\.InferenceService/(\w+)$"
CALLS = re.findall(LINE, README.read_text(), re.MULTILINE)


def test_every_call_is_documented() -> None:
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    assert {method for _, method in CALLS} == set(service.methods_by_name)


# Embed needs a model that embeds: tests/integration/cluster/test_embeddings.py
@pytest.mark.parametrize(("body", "method"), [call for call in CALLS if call[1] != "Embed"])
async def test_the_readmes_calls_work(site: Site, body: str, method: str) -> None:
    site.answer("fine")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{site.frontend.grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        kind = getattr(inference_pb2, f"{method}Request")
        request = json_format.Parse(body.replace('"MODEL"', f'"{MODEL}"'), kind())
        if method == "ListModels":
            assert (await stub.ListModels(request, timeout=20.0)).models
        else:
            assert "".join([r.text async for r in getattr(stub, method)(request, timeout=20.0)])


@pytest.mark.parametrize("method", ["Generate", "Chat", "Embed", "ListModels"])
async def test_bytes_that_are_no_message_are_the_clients_mistake(
    site: Site, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"/tandem.v1.InferenceService/{method}"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{site.frontend.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            if method in ("Generate", "Chat"):
                async for _ in channel.unary_stream(path)(b"\xff\xff\xff", timeout=20):
                    pass
            else:
                await channel.unary_unary(path)(b"\xff\xff\xff", timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_of(refused.value).code == "invalid_request"
    assert not caplog.records
