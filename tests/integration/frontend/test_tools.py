"""Tools and reasoning through the official client, streamed and not."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChunkEvent

from tandem.core.blocks import token_ids
from tests.integration.frontend.conftest import MODEL, Site, StartSite

HELLO = [{"role": "user", "content": "hello"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/n"}},
            "$defs": {"n": {"type": "integer"}},
        },
    },
}
SAY = {"type": "function", "function": {"name": "say"}}
ANSWER = (
    "<think>\nHm, grüß.\n</think>\n\nI will.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "say", "arguments": {}}\n</tool_call>'
)
PARSERS = {"tool_parser": "hermes", "reasoning_parser": "think"}
CALLS = [("add", '{"a": 1}'), ("say", "{}")]


async def told(site: Site, *, stream: bool, **wanted: Any) -> tuple[Any, Any, list[tuple[str, str]], str]:
    """(content, reasoning, calls, finish reason)"""
    if not stream:
        answer = await site.client.chat.completions.create(model=MODEL, messages=HELLO, **wanted)
        message = answer.choices[0].message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        return message.content, getattr(message, "reasoning_content", None), calls, answer.choices[0].finish_reason
    reasoning = ""
    async with site.client.chat.completions.stream(model=MODEL, messages=HELLO, **wanted) as events:
        async for event in events:
            if isinstance(event, ChunkEvent) and event.chunk.choices:
                reasoning += getattr(event.chunk.choices[0].delta, "reasoning_content", None) or ""
        final = await events.get_final_completion()
    message = final.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    assert len({call.id for call in message.tool_calls or ()}) == len(calls)
    return message.content or None, reasoning or None, calls, final.choices[0].finish_reason


@pytest.mark.parametrize("stream", [False, True])
async def test_auto(start_site: StartSite, stream: bool) -> None:
    async with start_site(model=PARSERS) as site:
        site.answer(ANSWER)
        assert await told(site, stream=stream, tools=[ADD, SAY]) == ("I will.", "Hm, grüß.", CALLS, "tool_calls")
        assert await told(site, stream=stream, tools=[ADD], logprobs=True) == (
            "I will.",
            "Hm, grüß.",
            CALLS,
            "tool_calls",
        )
        content, reasoning, calls, reason = await told(site, stream=stream, tools=[ADD], tool_choice="none")
        assert (reasoning, calls, reason) == ("Hm, grüß.", [], "stop")
        assert content.startswith("I will.\n<tool_call>")
        site.answer("Just words. ")
        assert await told(site, stream=stream, tools=[ADD]) == ("Just words. ", None, [], "stop")


@pytest.mark.parametrize("stream", [False, True])
async def test_required_and_named_are_the_engines_structured_output(site: Site, stream: bool) -> None:
    site.answer('[{"name": "add", "parameters": {"a": 1}}, {"name": "say", "parameters": {}}]')
    content, _, calls, reason = await told(site, stream=stream, tools=[ADD, SAY], tool_choice="required")
    assert (content, calls, reason) == (None, CALLS, "tool_calls")
    schema = json.loads(site.cluster.submits[-1].sampling.structured_output.json_schema)
    assert [item["properties"]["name"]["enum"] for item in schema["items"]["anyOf"]] == [["add"], ["say"]]
    assert schema["$defs"] == {"n": {"type": "integer"}}
    site.answer('{"a": 1}')
    named = {"type": "function", "function": {"name": "add"}}
    content, _, calls, reason = await told(site, stream=stream, tools=[ADD, SAY], tool_choice=named)
    assert (content, calls, reason) == (None, CALLS[:1], "tool_calls")
    schema = json.loads(site.cluster.submits[-1].sampling.structured_output.json_schema)
    assert schema == ADD["function"]["parameters"]


async def test_a_conversation_with_calls_is_a_prompt(start_site: StartSite) -> None:
    async with start_site(model=PARSERS) as site:
        site.answer(ANSWER)
        first = await site.client.chat.completions.create(model=MODEL, messages=HELLO, tools=[ADD])
        said = first.choices[0].message
        calls = said.tool_calls or []
        result = {"role": "tool", "tool_call_id": calls[0].id, "content": "3"}
        await site.client.chat.completions.create(model=MODEL, messages=[*HELLO, said, result], tools=[ADD])
        prompt = site.tokenizer.decode(token_ids(site.cluster.submits[1].prompt), skip_special_tokens=False)
        assert "<|im_start|>assistant\nI will.<|im_end|>\n<|im_start|>tool\n3<|im_end|>" in prompt


async def test_reasoning_is_an_item_of_its_own_in_responses(start_site: StartSite) -> None:
    async with start_site(model=PARSERS) as site:
        site.answer("<think>Hm, grüß.</think>\nopen")
        response = await site.client.responses.create(model=MODEL, input="q")
        stream = await site.client.responses.create(model=MODEL, input="q", stream=True)
        events = [event async for event in stream]
        thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        assert events[-1].type == "response.completed" and thought == "Hm, grüß."
        assert [event.sequence_number for event in events] == list(range(len(events)))
        for whole in (response, events[-1].response):
            assert whole.output_text == "open"
            assert [item.type for item in whole.output] == ["reasoning", "message"]
            assert whole.output[0].type == "reasoning" and whole.output[0].content[0].text == "Hm, grüß."
        again = [{"role": "user", "content": "q"}, *[item.model_dump() for item in response.output]]
        await site.client.responses.create(model=MODEL, input=[*again, {"role": "user", "content": "r"}])
        prompt = site.tokenizer.decode(token_ids(site.cluster.submits[-1].prompt), skip_special_tokens=False)
        assert "q<|im_end|>\n<|im_start|>assistant\nopen<|im_end|>\n<|im_start|>user\nr" in prompt
        site.answer("<think>cut")
        cut = await site.client.responses.create(model=MODEL, input="q", max_output_tokens=7)
        assert (cut.output_text, cut.status) == ("", "incomplete")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [ADD]}, "tools"),  # no parser for this model
        ({"tools": [ADD, ADD], "tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "colour": 1}}]}, "tools[0].function.colour"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)
async def test_refused(site: Site, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await site.client.chat.completions.create(model=MODEL, messages=HELLO, **change)
    assert (caught.value.code, caught.value.param) == ("invalid_request", param)
    assert not site.cluster.submits
