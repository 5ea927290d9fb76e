"""The official client against the frontend: what goes in reaches the bus, what comes back is whole."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from tandem.core.blocks import root_hash, sequence_hashes, token_ids
from tandem.errors import EngineFailed, NoWorkers, Overloaded
from tests.integration.frontend.conftest import MODEL, Site, StartSite

HELLO = [{"role": "user", "content": "hello"}]
TEXT = "Grüße 👩‍👩‍👧 an\nalle, 你好!"


async def streamed(stream: openai.AsyncStream) -> tuple[str, list[str]]:
    text, reasons = "", []
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return text, reasons


async def test_chat(site: Site) -> None:
    site.answer(TEXT)
    answer = await site.client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    prompt = site.ids("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    submit = site.cluster.submits[0]
    assert list(token_ids(submit.prompt)) == prompt
    assert submit.block_hashes == sequence_hashes(submit.prompt, 32, root_hash(MODEL)).tobytes()
    assert submit.sampling.max_tokens == 512 - len(prompt)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(site.ids(TEXT)) + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_chat_streamed(site: Site) -> None:
    site.answer(TEXT)
    stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert await streamed(stream) == (TEXT, ["stop"])


async def test_usage_comes_last_in_a_stream_when_asked_for(site: Site) -> None:
    site.answer("abc")
    stream = await site.client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == len(site.ids("abc")) + 1
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens == 4


async def test_sampling_reaches_the_bus(site: Site) -> None:
    site.answer("x")
    await site.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=-1,
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        logit_bias={"5": 2},
        user="somebody",
        metadata={"a": "b"},
        extra_body={"top_k": 4, "min_p": 0.1, "ignore_eos": True, "min_tokens": 2, "repetition_penalty": 1.1},
        extra_headers={"traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "x-request-id": "mine"},
    )
    submit = site.cluster.submits[0]
    sampling = submit.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 4)
    assert (sampling.min_p, sampling.seed, sampling.ignore_eos, sampling.min_tokens) == (0.1, 2**63 - 1, True, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1.5)
    assert (sampling.repetition_penalty, dict(sampling.logit_bias)) == (1.1, {5: 2.0})
    assert submit.traceparent == f"00-{'1' * 32}-{'2' * 16}-01"
    assert submit.tenant == "default" and submit.request_class == "interactive"
    assert 590_000 < submit.timeout_ms <= 600_000


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_across_tokens(site: Site, stream: bool) -> None:
    site.answer("one two three STOPPED")
    wanted = {"model": MODEL, "messages": HELLO, "stop": ["o thr", "STOP"], "stream": stream}
    answer = await site.client.chat.completions.create(**wanted)
    if stream:
        text, reasons = await streamed(answer)
    else:
        text, reasons = answer.choices[0].message.content, [answer.choices[0].finish_reason]
        assert answer.usage.prompt_tokens_details.cached_tokens == 4  # from the finish that the abort brought
    assert (text, reasons) == ("one tw", ["stop"])
    await site.until(lambda: site.cluster.aborts)
    assert site.frontend.cluster.in_flight == 0


async def test_tokens_that_end_it_count_and_say_nothing(site: Site) -> None:
    end = site.ids("!")[0]
    site.cluster.script = lambda submit: [*site.ids("abc"), end]
    answer = await site.client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"stop_token_ids": [end]}
    )
    assert answer.choices[0].message.content == "abc"
    assert answer.usage is not None and answer.usage.completion_tokens == len(site.ids("abc")) + 1
    site.answer("abc")
    answer = await site.client.chat.completions.create(
        model=MODEL, messages=HELLO, extra_body={"skip_special_tokens": False}
    )
    assert answer.choices[0].message.content == "abc"


async def test_n_is_fanned_out(site: Site) -> None:
    texts = ["first", "second one", "third"]
    site.cluster.script = lambda submit: [*site.ids(texts[submit.key.choice]), 2]
    answer = await site.client.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=5)
    assert [choice.message.content for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(submit.sampling.seed for submit in site.cluster.submits) == [5, 6, 7]
    assert len({submit.key.id for submit in site.cluster.submits}) == 1
    assert len({submit.rid for submit in site.cluster.submits}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(site.ids(text)) + 1 for text in texts)


async def test_completions_by_texts_and_token_ids(site: Site) -> None:
    site.cluster.script = lambda submit: [*token_ids(submit.prompt), 2]
    prompts = ["abc", "def"]
    answer = await site.client.completions.create(model=MODEL, prompt=prompts, echo=True)
    assert [choice.text for choice in answer.choices] == ["abcabc", "defdef"]
    answer = await site.client.completions.create(model=MODEL, prompt=site.ids("xyz"))
    assert answer.choices[0].text == "xyz"
    stream = await site.client.completions.create(model=MODEL, prompt=[site.ids("xyz")], stream=True, max_tokens=1)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_logprobs(site: Site) -> None:
    site.answer("ab")
    other = site.ids("z")[0]
    site.cluster.logprobs = lambda token: [(token, -1.5, 2), (other, -0.5, 1)]
    answer = await site.client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1)
    content = answer.choices[0].logprobs.content
    ids = [*site.ids("ab"), 2]
    assert [entry.token for entry in content] == [site.tokenizer.token_bytes(i).decode() for i in ids]
    assert [(entry.logprob, entry.top_logprobs[0].token) for entry in content] == [(-1.5, "z")] * len(ids)
    legacy = await site.client.completions.create(model=MODEL, prompt="q", logprobs=2)
    assert legacy.choices[0].logprobs.text_offset[0] == 0
    assert legacy.choices[0].logprobs.top_logprobs[0]["z"] == -0.5
    stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, stream=True)
    seen = [c.choices[0].logprobs.content[0].token async for c in stream if c.choices[0].logprobs]
    assert seen == [entry.token for entry in content]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_covers_the_prompt(site: Site, stream: bool) -> None:
    site.answer("ü!")
    answer = await site.client.completions.create(model=MODEL, prompt="né a", echo=True, logprobs=1, stream=stream)
    choices = [chunk.choices[0] async for chunk in answer if chunk.choices] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "né aü!"
    parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
    prompt = site.ids("né a")
    tokens = [token for part in parts for token in part.tokens]
    assert len(tokens) == len(prompt) + len(site.ids("ü!")) + 1
    values = [value for part in parts for value in part.token_logprobs]
    assert values == [None, *[-0.25] * (len(prompt) - 1), *[-0.5] * (len(tokens) - len(prompt))]
    assert parts[0].top_logprobs[0] is None
    offsets = [offset for part in parts for offset in part.text_offset]
    assert offsets == sorted(offsets)
    assert offsets[len(prompt)] == len("né a") and offsets[-1] == len("né aü!")
    submit = site.cluster.submits[0]
    assert submit.local_only and submit.sampling.prompt_logprobs == 1


async def test_echo_with_more_logprobs_than_a_message_carries(site: Site) -> None:
    site.frontend._intake.models[MODEL] = _with_context(site, 50_000)
    with pytest.raises(openai.BadRequestError) as caught:
        await site.client.completions.create(model=MODEL, prompt=[5] * 40_001, echo=True, logprobs=4)
    assert caught.value.param == "logprobs"
    assert not site.cluster.submits


async def test_models(site: Site) -> None:
    listed = [model async for model in site.client.models.list()]
    assert [model.id for model in listed] == [MODEL]
    assert (await site.client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await site.client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temperature": 9}, "temperature", "2.0"),
        ({"top_p": 0}, "top_p", "0.0"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"n": 17}, "n", "16"),
        ({"foo_bar": 1}, "foo_bar", "unknown"),
        ({"messages": []}, "messages", "1"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role", "alien"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "image_url"),
        ({"stop": [""]}, "stop[0]", "1"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
        ({"request_class": "gold"}, "request_class", "batch"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "9"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, ""),
    ],
)
async def test_refused_before_anything_runs(
    site: Site, change: dict[str, object], param: str | None, words: str
) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True, **change}
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{site.url}/v1/chat/completions", content=json.dumps(body))
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_request")
    assert words in error["message"]
    assert param is None or error["param"] == param
    assert not site.cluster.submits


async def test_a_prompt_over_the_context_names_both_numbers(site: Site) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(openai.BadRequestError) as caught:
        await site.client.chat.completions.create(model=MODEL, messages=long, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert "512" in caught.value.message
    prompt = len(site.ids(f"<|im_start|>user\n{'x' * 600}<|im_end|>\n<|im_start|>assistant\n"))
    assert str(prompt) in caught.value.message
    with pytest.raises(openai.BadRequestError, match="512"):
        await site.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=512)


async def test_bad_bodies(start_site: StartSite) -> None:
    from tandem.adapters.deployment import Limits

    async with start_site(limits=Limits(max_body_bytes=1000)) as site, httpx.AsyncClient() as client:
        url = f"{site.url}/v1/chat/completions"
        for body, status, code in [
            (b"{", 400, "invalid_request"),
            (b"", 400, "invalid_request"),
            (b"[" * 900, 400, "invalid_request"),
            (b'"\xff"', 400, "invalid_request"),
            (b"x" * 1001, 413, "payload_too_large"),
        ]:
            response = await client.post(url, content=body)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)

        async def endless():
            for _ in range(50):
                yield b"x" * 100

        response = await client.post(url, content=endless())
        assert response.status_code == 413
        response = await client.get(url)
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        response = await client.post(f"{site.url}/v1/nothing", content=b"{}")
        assert (response.status_code, "error" in response.json()) == (404, True)


async def test_unknown_model(site: Site) -> None:
    with pytest.raises(openai.NotFoundError, match=MODEL):
        await site.client.chat.completions.create(model="gpt", messages=HELLO)


async def test_keys_and_classes_of_tenants(start_site: StartSite) -> None:
    async with start_site(tenants=True) as site:
        site.answer("x")
        await site.client.chat.completions.create(model=MODEL, messages=HELLO)
        submit = site.cluster.submits[0]
        assert (submit.tenant, submit.request_class, submit.cache_salt) == ("t1", "batch", "t1")
        assert submit.timeout_ms <= 50_000
        assert submit.block_hashes == sequence_hashes(submit.prompt, 32, root_hash(MODEL, "", "t1")).tobytes()
        with pytest.raises(openai.PermissionDeniedError):
            await site.client.chat.completions.create(
                model=MODEL, messages=HELLO, extra_body={"request_class": "interactive"}
            )
        for key in ("wrong", ""):
            other = openai.AsyncOpenAI(base_url=site.url + "/v1", api_key=key or "none", max_retries=0)
            with pytest.raises(openai.AuthenticationError):
                await other.chat.completions.create(model=MODEL, messages=HELLO)
            with pytest.raises(openai.AuthenticationError):
                await other.models.list()
            await other.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_have_their_status_also_for_streams(site: Site, stream: bool) -> None:
    site.cluster.refusal = Overloaded("the queue is full", retry_after_s=2.2)
    with pytest.raises(openai.RateLimitError) as caught:
        await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.code == "overloaded"
    site.cluster.refusal = NoWorkers("none")
    with pytest.raises(openai.InternalServerError) as failed:
        await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    assert failed.value.status_code == 503


async def test_an_error_after_the_stream_opened_is_an_event(site: Site) -> None:
    site.cluster.script = lambda submit: site.ids("x" * 400)
    stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, seed=1)
    with pytest.raises(openai.APIError, match="engine broke"):
        async for _ in stream:
            site.cluster.fail_running(EngineFailed("engine broke"))


async def test_a_plain_stream_goes_on_after_its_engine_failed(site: Site) -> None:
    whole = site.ids("the quick brown fox jumps over the lazy dog " * 4)
    prompt_length = len(site.ids("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"))
    site.cluster.script = lambda submit: [*whole[submit.isl_tokens - prompt_length :], 2]
    stream = await site.client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}, max_tokens=300
    )
    text, seen, usage = "", 0, None
    async for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            seen += 1
        usage = chunk.usage
        if seen == 20:
            site.cluster.fail_running(EngineFailed("engine broke"))
    assert text == site.tokenizer.decode(whole)
    first, second = site.cluster.submits
    assert (first.key.attempt, second.key.attempt) == (0, 1)
    carried = second.isl_tokens - first.isl_tokens
    assert carried > 0 and second.sampling.max_tokens == 300 - carried
    assert list(second.avoid_workers) == ["worker"]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_length, len(whole) + 1)


async def test_lost_frames_are_asked_for(site: Site) -> None:
    site.answer("a long enough answer to lose a frame or two on the way")
    frames = 0

    def lossy(frame: object) -> bool:
        nonlocal frames
        frames += 1
        return frames in (3, 4, 9)

    site.cluster.lossy = lossy
    answer = await site.client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "a long enough answer to lose a frame or two on the way"
    assert len(site.cluster.submits) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
async def test_a_client_that_goes_away_ends_its_request(site: Site, stream: bool, queued: bool) -> None:
    site.cluster.script = lambda submit: site.ids("x") * 100_000
    site.cluster.holding = queued
    call = asyncio.create_task(
        site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream, extra_body={"ignore_eos": True})
    )
    await site.until(lambda: site.cluster.submits)
    if stream and not queued:
        answer = await call
        async for _ in answer:
            break
        await answer.close()
    else:
        call.cancel()
    await site.until(lambda: site.cluster.aborts)
    await site.until(lambda: not site.cluster.running)
    assert site.cluster.aborts[0].id == site.cluster.submits[0].key.id
    await site.until(lambda: site.frontend.cluster.in_flight == 0 and len(site.frontend.generations) == 0)


async def test_a_long_wait_opens_the_stream_and_keeps_it_alive(start_site: StartSite) -> None:
    async with start_site(idle_s=0.3) as site:
        site.cluster.holding = True
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        async with (
            httpx.AsyncClient() as client,
            client.stream("POST", f"{site.url}/v1/chat/completions", json=body, timeout=20.0) as response,
        ):
            assert response.status_code == 200
            comments = 0
            async for line in response.aiter_lines():
                comments += line.startswith(":")
                if comments == 3:
                    break


async def test_a_reader_that_never_reads_is_cut_off_and_the_others_are_not(site: Site) -> None:
    site.cluster.step_s = 0.0
    site.cluster.script = lambda submit: site.ids("word ") * 60_000
    site.frontend._intake.models[MODEL] = _with_context(site, 1_000_000)
    body = json.dumps({"model": MODEL, "messages": HELLO, "stream": True, "ignore_eos": True})
    host, port = "127.0.0.1", site.frontend.http_port
    reader, writer = await asyncio.open_connection(host, port, limit=1024)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
    await site.until(lambda: site.cluster.running)
    await site.until(lambda: site.cluster.aborts, timeout_s=60.0)
    assert site.frontend.cluster.in_flight == 0
    writer.transport.abort()
    site.answer("fine")
    answer = await site.client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "fine"


def _with_context(site: Site, tokens: int) -> object:
    import dataclasses

    return dataclasses.replace(site.frontend._intake.models[MODEL], max_model_len=tokens)


async def test_request_id_health_and_documentation(site: Site) -> None:
    site.answer("x")
    body = {"model": MODEL, "messages": HELLO}
    async with httpx.AsyncClient(base_url=site.url) as client:
        response = await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "abc"})
        assert response.headers["x-request-id"] == "abc"
        response = await client.post("/v1/chat/completions", json=body)
        assert len(response.headers["x-request-id"]) == 32
        assert (await client.get("/healthz")).status_code == 200
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["leaders"]) == (200, {MODEL: True})
        paths = (await client.get("/openapi.json")).json()
        posted = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"}
        assert posted | {"/v1/models"} <= paths["paths"].keys()
        assert "temperature" in paths["components"]["schemas"]["ChatRequest"]["properties"]
        assert (await client.get("/docs")).status_code == 200


async def test_over_the_limit_of_connections(start_site: StartSite) -> None:
    from tandem.adapters.deployment import Limits

    async with start_site(limits=Limits(max_connections=2)) as site:
        site.answer("x")
        held = [await asyncio.open_connection("127.0.0.1", site.frontend.http_port) for _ in range(2)]
        await site.until(lambda: len(site.frontend._http.server_state.connections) == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            await site.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        async with httpx.AsyncClient(base_url=site.url) as client:
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 429
        for _, writer in held:
            writer.close()
        await site.until(lambda: not site.frontend._http.server_state.connections)
        await site.client.chat.completions.create(model=MODEL, messages=HELLO)


async def test_connections_send_small_writes_at_once(site: Site) -> None:
    import socket

    site.answer("x")
    await site.client.chat.completions.create(model=MODEL, messages=HELLO)
    (connection,) = site.frontend._http.server_state.connections
    peer = connection.transport.get_extra_info("socket")
    assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_leaving_lets_open_streams_end(site: Site) -> None:
    text = "slowly but surely to the end"
    site.answer(text)
    site.cluster.step_s = 0.02
    stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    stopping = asyncio.create_task(site.frontend.stop())
    await site.until(lambda: not site.frontend.readiness()["ready"])
    assert await streamed(stream) == (text, ["stop"])
    await stopping


async def test_a_stream_that_outlasts_the_drain_is_told_so(start_site: StartSite) -> None:
    async with start_site(drain_timeout_s=0.3) as site:
        site.answer("on and on " * 40)
        site.cluster.step_s = 0.1
        stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        stopping = asyncio.create_task(site.frontend.stop())
        with pytest.raises(openai.APIError, match="is leaving"):
            await streamed(stream)
        await stopping
