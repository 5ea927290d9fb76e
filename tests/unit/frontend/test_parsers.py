"""Parsers of model output: what each family writes, and that the borders of the pieces change nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.frontend.parsers import harmony
from services.frontend.parsers.families import new_parser
from services.frontend.parsers.forced import Named, Required
from services.frontend.parsers.hermes import Hermes
from services.frontend.parsers.output import Call, OutputParser, Parsed, Then
from services.frontend.parsers.reasoning import Reasoning
from services.frontend.parsers.tail import Llama3, Mistral
from tandem.errors import ConfigError

TOOLS = ("add", "say")
ADD = '{"name": "add", "arguments": {"a": 1, "b": [2.50]}}'
SAY = '{"name": "say", "parameters": {"text": "grüß </tool_call> [TOOL_CALLS] \\"dich\\""}}'
CALL_ADD = Call("add", '{"a": 1, "b": [2.50]}')
CALL_SAY = Call("say", '{"text": "grüß </tool_call> [TOOL_CALLS] \\"dich\\""}')


def think() -> OutputParser:
    return Reasoning("<think>", "</think>")


PARSERS: dict[str, Callable[[], OutputParser]] = {
    "hermes": Hermes,
    "llama3": lambda: Llama3(TOOLS),
    "mistral": Mistral,
    "think": think,
    "think, inside": lambda: Reasoning("<think>", "</think>", inside=True),
    "think, then hermes": lambda: Then(think(), Hermes()),
    "required": Required,
    "named": lambda: Named("add"),
}
FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    ADD,
    SAY,
    f"[{ADD}, {SAY}]",
    "add",
    '{"a": 1}',
    "; ",
    "\n",
    " ",
    "<tool_",
    "</thi",
    "{",
    '{"x": "',
    "\u00e9",
    "words",
]


def parse(parser: OutputParser, pieces: Sequence[str]) -> Parsed:
    parsed = Parsed()
    for piece in pieces:
        parsed += parser.push(piece)
    return parsed + parser.finish()


def cut(text: str, at: Sequence[int]) -> list[str]:
    borders = [0, *sorted({index % (len(text) + 1) for index in at}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None)
@given(
    fragments=st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=8), at=st.lists(st.integers(0, 999))
)
def test_borders_change_nothing(name: str, fragments: list[str], at: list[int]) -> None:
    text = "".join(fragments)
    whole = parse(PARSERS[name](), [text])
    assert parse(PARSERS[name](), cut(text, at)) == whole
    assert parse(PARSERS[name](), list(text)) == whole
    for call in whole.calls:
        assert name == "named" or isinstance(json.loads(call.arguments), object)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", "just\n\nwords ", Parsed("just\n\nwords ")),
        ("hermes", f"<tool_call>\n{ADD}\n</tool_call>", Parsed(calls=[CALL_ADD])),
        (
            "hermes",
            f"I will.\n<tool_call>{ADD}</tool_call>\n<tool_call>{SAY}</tool_call>\n",
            Parsed("I will.", calls=[CALL_ADD, CALL_SAY]),
        ),
        ("hermes", f"<tool_call>{ADD}", Parsed(calls=[CALL_ADD])),
        ("hermes", "<tool_call>no</tool_call> x", Parsed("<tool_call>no</tool_call> x")),
        ("hermes", '<tool_call>{"name": "add", "arg', Parsed('<tool_call>{"name": "add", "arg')),
        ("hermes", "a <tool_ b", Parsed("a <tool_ b")),
        ("llama3", SAY, Parsed(calls=[CALL_SAY])),
        ("llama3", f"{SAY}; {ADD}", Parsed(calls=[CALL_SAY, CALL_ADD])),
        ("llama3", f"Well.<|python_tag|>{SAY}", Parsed("Well.", calls=[CALL_SAY])),
        ("llama3", '{"name": "other", "parameters": {}}', Parsed('{"name": "other", "parameters": {}}')),
        ("llama3", '{"answer": 42}', Parsed('{"answer": 42}')),
        ("llama3", "use {braces}", Parsed("use {braces}")),
        ("mistral", f"[TOOL_CALLS][{ADD}, {SAY}]", Parsed(calls=[CALL_ADD, CALL_SAY])),
        (
            "mistral",
            '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]say{}',
            Parsed(calls=[Call("add", '{"a": 1}'), Call("say", "{}")]),
        ),
        ("mistral", "Hm. [TOOL_CALLS]nothing", Parsed("Hm. nothing")),
        ("think", "<think>\nLet me see.\n</think>\n\nYes.", Parsed("Yes.", "Let me see.")),
        ("think", "No <think>x</think>", Parsed("No <think>x</think>")),
        ("think", "<think>cut off", Parsed("", "cut off")),
        ("think, inside", "a\n</think>b", Parsed("b", "a")),
        ("think, then hermes", f"<think>{ADD}</think><tool_call>{ADD}</tool_call>", Parsed("", ADD, [CALL_ADD])),
        ("required", f"[{ADD}, {SAY}]", Parsed(calls=[CALL_ADD, CALL_SAY])),
        ("required", f"[{ADD}, {SAY[:-9]}", Parsed(f"[{ADD}, {SAY[:-9]}")),
        ("named", '{"a": 1}', Parsed(calls=[Call("add", '{"a": 1}')])),
    ],
)
def test_families(name: str, text: str, expected: Parsed) -> None:
    assert parse(PARSERS[name](), [text]) == expected
    assert parse(PARSERS[name](), list(text)) == expected


@pytest.mark.parametrize("body", ["[" * 100_000, '{"name": "add", "arguments": ' + "[" * 100_000, "9" * 100_000])
@pytest.mark.parametrize("opening", ["<tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "", "[TOOL_CALLS]x"])
@pytest.mark.parametrize("name", PARSERS)
def test_what_cannot_be_read_is_text(name: str, opening: str, body: str) -> None:
    parsed = parse(PARSERS[name](), [opening + body, "</tool_call>"])
    assert name == "named" or not parsed.calls
    said = parsed.text + parsed.reasoning + "".join(call.arguments for call in parsed.calls)
    assert len(said) >= len(body)


def test_text_is_not_held_back_longer_than_needed() -> None:
    parser = Hermes()
    assert parser.push("Hello there").text == "Hello there"
    assert parser.push(" <b>").text == " <b>"
    assert parser.push(" <tool").text == ""
    assert parser.push("box>").text == " <toolbox>"


def test_ids_of_mistral_are_what_its_template_takes() -> None:
    (call,) = parse(Mistral(), ["[TOOL_CALLS]add{}"]).calls
    assert len(call.id) == 9 and call.id.isalnum()


def test_a_prompt_that_opens_the_reasoning() -> None:
    opened = new_parser("", "think", prompt="<|assistant|><think>\n", tools=())
    assert opened is not None and parse(opened(), ["a</think>b"]) == Parsed("b", "a")
    assert new_parser("hermes", "", prompt="", tools=()) is None


# -- harmony -----------------------------------------------------------------------------------------------------------

FINAL = "<|channel|>analysis<|message|>Hm. 👩‍👩‍👧<|end|><|start|>assistant<|channel|>final<|message|>Grüße!"
CALLED = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
    '<|constrain|>json<|message|>{"a": 1}<|call|>'
)
HARMONY_FRAGMENTS = [
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|start|>",
    "assistant",
    "analysis",
    "final",
    FINAL,
    CALLED,
]


@pytest.fixture(scope="module")
def harmony_vocabulary() -> None:
    try:
        harmony.encoding()
    except ConfigError as error:
        pytest.skip(error.message)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FINAL, Parsed("Grüße!", "Hm. 👩‍👩‍👧")),
        (CALLED, Parsed("", "Hm.", [Call("add", '{"a": 1}')])),
        (CALLED.removesuffix("<|call|>"), Parsed("", "Hm.", [Call("add", '{"a": 1}')])),
        ("plain words", Parsed("plain words")),
    ],
)
def test_harmony(harmony_vocabulary: None, text: str, expected: Parsed) -> None:
    assert parse(harmony.Harmony(), [text]) == expected
    assert parse(harmony.Harmony(), list(text)) == expected


@settings(max_examples=100, deadline=None)
@given(
    fragments=st.lists(st.sampled_from(HARMONY_FRAGMENTS) | st.text(max_size=4), max_size=6),
    at=st.lists(st.integers(0, 999)),
)
def test_borders_change_nothing_in_harmony(harmony_vocabulary: None, fragments: list[str], at: list[int]) -> None:
    text = "".join(fragments)
    assert parse(harmony.Harmony(), cut(text, at)) == parse(harmony.Harmony(), [text])
