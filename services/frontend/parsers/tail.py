"""Families whose calls come last: text up to an opening, and everything after it is calls. Llama 3 and Mistral."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection

from services.frontend.parsers.output import (
    Call,
    Margins,
    OutputParser,
    Parsed,
    end_of_json,
    held_back,
    read_call,
    read_calls,
)


class _CallsLast(OutputParser):
    opening: str

    def __init__(self) -> None:
        self._margins = Margins()
        self._text = ""
        self._open = False

    def push(self, text: str) -> Parsed:
        self._text += text
        if self._open or self._undecided():
            return Parsed()
        before, found, rest = self._text.partition(self.opening)
        if found:
            self._open, self._text = True, rest
            return Parsed(self._margins.text(before))
        keep = held_back(before, (self.opening,))
        self._text = before[len(before) - keep :]
        return Parsed(self._margins.text(before[: len(before) - keep]))

    def finish(self) -> Parsed:
        body, self._text = self._text, ""
        if self._open:
            try:
                calls = self._calls(body)
            except ValueError:
                calls = []
            if calls:
                return Parsed(calls=calls)
        return Parsed(self._margins.text(body) + self._margins.finish())

    def _undecided(self) -> bool:
        """Whether it has to see more before it can tell text from calls."""
        return False

    def _calls(self, text: str) -> list[Call]:
        """ValueError for what are none."""
        raise NotImplementedError


class Llama3(_CallsLast):
    """{"name", "parameters"}, several with ";" between, after <|python_tag|> or as the whole answer."""

    opening = "<|python_tag|>"
    markers = (opening,)

    def __init__(self, tools: Collection[str]) -> None:
        """``tools``: their names, which tell a call from an answer in JSON."""
        super().__init__()
        self._tools = tools
        self._begun = False

    def _undecided(self) -> bool:
        if self._begun:
            return False
        start = self._text.lstrip()
        if not start:
            return True
        self._begun = True
        self._open = start.startswith("{")
        return self._open

    def _calls(self, text: str) -> list[Call]:
        calls = []
        at = 0
        while rest := text[at:].lstrip(" \t\r\n;"):
            start = len(text) - len(rest)
            at = end_of_json(text, start)
            calls.append(read_call(text[start:at]))
        if any(call.name not in self._tools for call in calls):
            raise ValueError("no tool of that name")
        return calls


class Mistral(_CallsLast):
    """A list of {"name", "arguments"} after [TOOL_CALLS]; or, from v11 on, name[ARGS]{...} after each [TOOL_CALLS]."""

    opening = "[TOOL_CALLS]"
    markers = (opening, "[ARGS]", "[CALL_ID]")

    _head = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\]\s*([^\s\[{]+)\s*)?(?:\[ARGS\]\s*)?(?=\{)")

    def _calls(self, text: str) -> list[Call]:
        if text.lstrip().startswith("["):
            return read_calls(text, _call_id)
        calls = []
        at = 0
        while text[at:].strip():
            head = self._head.match(text, at)
            if head is None:
                raise ValueError("no call")
            at = end_of_json(text, head.end())
            calls.append(Call(head[1], text[head.end() : at], head[2] or _call_id()))
            rest = text[at:].lstrip()
            at = len(text) - len(rest.removeprefix(self.opening))
        return calls


def _call_id() -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    return uuid.uuid4().hex[:9]
