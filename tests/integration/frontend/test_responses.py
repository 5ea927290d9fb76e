"""OpenAI's Responses API through the official client: its types parse what comes back, whole and as events."""

from __future__ import annotations

import openai
import pytest

from tandem.core.blocks import token_ids
from tandem.errors import EngineFailed, Overloaded
from tests.integration.frontend.conftest import MODEL, Site

TEXT = "Grüße 👩‍👩‍👧 an\nalle!"


async def test_whole(site: Site) -> None:
    site.answer(TEXT)
    response = await site.client.responses.create(
        model=MODEL, input="hello", instructions="Be kind.", max_output_tokens=90, temperature=0.5
    )
    assert (response.output_text, response.status, response.error) == (TEXT, "completed", None)
    assert response.usage is not None
    assert response.usage.output_tokens == len(site.ids(TEXT)) + 1
    assert response.usage.input_tokens_details.cached_tokens == 4
    assert (response.instructions, response.max_output_tokens, response.temperature) == ("Be kind.", 90, 0.5)
    submit = site.cluster.submits[0]
    prompt = site.tokenizer.decode(token_ids(submit.prompt), skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>")
    assert (submit.sampling.max_tokens, submit.sampling.temperature) == (90, 0.5)


async def test_an_answer_is_input_again(site: Site) -> None:
    site.answer("first")
    response = await site.client.responses.create(model=MODEL, input=[{"role": "user", "content": "hello"}])
    again = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        *[item.model_dump() for item in response.output],
        {"type": "message", "role": "user", "content": "more"},
    ]
    await site.client.responses.create(model=MODEL, input=again)  # type: ignore[arg-type]
    prompt = site.tokenizer.decode(token_ids(site.cluster.submits[1].prompt), skip_special_tokens=False)
    assert "<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\nmore" in prompt


async def test_events(site: Site) -> None:
    site.answer(TEXT)
    stream = await site.client.responses.create(model=MODEL, input="hello", stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == TEXT
    async with site.client.responses.stream(model=MODEL, input="hello") as managed:
        async for _ in managed:
            pass
        assert (await managed.get_final_response()).output_text == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_cut_at_its_length(site: Site, stream: bool) -> None:
    site.answer(TEXT)
    answer = await site.client.responses.create(model=MODEL, input="hello", max_output_tokens=3, stream=stream)
    if stream:
        events = [event async for event in answer]
        assert events[-1].type == "response.incomplete"
        answer = events[-1].response
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


async def test_a_failure_after_the_opening_is_an_event(site: Site) -> None:
    site.cluster.script = lambda submit: site.ids("x" * 400)
    stream = await site.client.responses.create(model=MODEL, input="q", stream=True, extra_body={"seed": 1})
    events = []
    async for event in stream:
        events.append(event)
        site.cluster.fail_running(EngineFailed("engine broke"))
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert (events[-2].code, events[-2].message) == ("engine_failed", "engine broke")
    assert events[-1].response.error.message == "engine broke"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"content": "no role"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None),
        ({"truncation": "auto"}, "truncation"),
        ({"extra_body": {"colour": 1}}, "colour"),
    ],
)
async def test_refused_before_anything_runs(site: Site, change: dict[str, object], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await site.client.responses.create(**{"model": MODEL, "input": "hi", **change})
    assert caught.value.code == "invalid_request"
    assert param is None or caught.value.param == param
    assert not site.cluster.submits


async def test_refusals_have_their_status(site: Site) -> None:
    site.cluster.refusal = Overloaded("full", retry_after_s=2.0)
    with pytest.raises(openai.RateLimitError):
        await site.client.responses.create(model=MODEL, input="hi", stream=True)
