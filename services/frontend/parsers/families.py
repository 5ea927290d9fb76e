"""Which parser goes with which name of the deployment file."""

from __future__ import annotations

from collections.abc import Collection

from services.frontend.parsers import harmony
from services.frontend.parsers.hermes import Hermes
from services.frontend.parsers.output import NewParser, OutputParser, Then
from services.frontend.parsers.reasoning import Reasoning
from services.frontend.parsers.tail import Llama3, Mistral

#: name -> opening and closing mark
_REASONING = {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}


def check(tool_parser: str, reasoning_parser: str) -> None:
    """ConfigError if one of them lacks what it needs."""
    if "harmony" in (tool_parser, reasoning_parser):
        harmony.encoding()


def new_parser(tool_parser: str, reasoning_parser: str, *, prompt: str, tools: Collection[str]) -> NewParser | None:
    """For answers to ``prompt``; calls are looked for where there are ``tools`` (their names). None: all is text."""
    if "harmony" in (tool_parser, reasoning_parser):
        return harmony.Harmony
    has_calls = bool(tool_parser and tools)
    marks = _REASONING.get(reasoning_parser)
    if marks is None:
        return (lambda: _tool_parser(tool_parser, tools)) if has_calls else None
    opening, closing = marks
    inside = prompt.rstrip().endswith(opening)

    def both() -> OutputParser:
        reasoning = Reasoning(opening, closing, inside=inside)
        return Then(reasoning, _tool_parser(tool_parser, tools)) if has_calls else reasoning

    return both


def _tool_parser(name: str, tools: Collection[str]) -> OutputParser:
    if name == "hermes":
        return Hermes()
    return Llama3(tools) if name == "llama3" else Mistral()
