"""A stream under way, packed: the same bytes as the long way, and only for what is plain."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from services.frontend.generation import Delta
from services.frontend.line import Line
from services.frontend.openai_responses import ChatAnswer, CompletionAnswer

TEXTS = ["a", 'say "b"', "", None, " \u00e9\n"]
ANSWER: dict[str, Any] = {
    "id": "q", "created": 1, "model": "m", "choices": 2, "include_usage": True, "tokenizer": None
}  # fmt: skip


class Client:
    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.flow = SimpleNamespace(write_paused=False)
        self.filled = 0

    def full(self) -> None:
        self.filled += 1

    def line(self, around: tuple[bytes, bytes]) -> Line:
        return Line(TEXTS, around, self.got.append, self.flow, self.full)


@pytest.mark.parametrize("form", [ChatAnswer, CompletionAnswer])
@pytest.mark.parametrize("tokens", [[0], [1], [4], [0, 1], [2, 0, 2, 4]])
def test_the_same_events_as_the_long_way(form: Any, tokens: list[int]) -> None:
    client, answer = Client(), form(**ANSWER)
    assert client.line(answer.around_text(1)).take(tokens)
    (chunk,) = client.got
    size, _, rest = chunk.partition(b"\r\n")
    assert rest == answer.events([Delta(1, TEXTS[token] or "") for token in tokens]) + b"\r\n"
    assert int(size, 16) == len(rest) - 2
    for event in rest.decode().strip().split("\n\n"):
        json.loads(event.removeprefix("data: "))


def test_tokens_that_say_nothing_write_nothing() -> None:
    client = Client()
    assert client.line((b"<", b">")).take([2, 2])
    assert not client.got


@pytest.mark.parametrize("tokens", [[3], [0, 3], [5], [0, 99]])
def test_parts_of_characters_and_unknown_tokens_are_not_for_it(tokens: list[int]) -> None:
    client = Client()
    assert not client.line((b"<", b">")).take(tokens)
    assert not client.got


def test_it_says_when_the_client_is_full() -> None:
    client = Client()
    line = client.line((b"<", b">"))
    assert line.take([0]) and not client.filled
    client.flow.write_paused = True
    assert line.take([0]) and client.filled == 1
    assert len(client.got) == 2
