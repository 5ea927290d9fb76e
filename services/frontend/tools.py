"""The tools that a chat offers, and what ``tool_choice`` makes of them: for the template, the engine and the parser."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from services.frontend.parsers.forced import Named, Required
from services.frontend.parsers.output import NewParser
from services.frontend.served_model import ServedModel
from tandem.core.types import StructuredOutput
from tandem.errors import InvalidRequest

ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}\Z")]


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: Function


class ChosenFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NamedChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class ToolUse(Struct, frozen=True):
    """``offered``: as the chat template takes them. ``forced``: the answer is calls, and nothing else."""

    offered: list[dict[str, Any]] | None = None
    structured_output: StructuredOutput | None = None
    forced: NewParser | None = None

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.offered or ()]


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None, model: ServedModel) -> ToolUse:
    """InvalidRequest if they do not go together, or not with the model."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice: there are no tools to choose from", param="tool_choice")
        return ToolUse()
    functions = {tool.function.name: tool.function for tool in tools}
    if len(functions) != len(tools):
        raise InvalidRequest("tools: two of them have the same name", param="tools")
    if choice == "none":
        return ToolUse()
    offered = [msgspec.to_builtins(tool) for tool in tools]
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        if name not in functions:
            raise InvalidRequest(f"tool_choice: there is no tool {name[:40]!r} in tools", param="tool_choice")
        return ToolUse(offered, _schema(_parameters(functions[name])), lambda: Named(name))
    if choice == "required":
        return ToolUse(offered, _schema(_list_of_calls(list(functions.values()))), Required)
    if not model.tool_parser:
        raise InvalidRequest(
            f"tools: model {model.name!r} has no `tool_parser` in the deployment file, so its calls cannot be read; "
            'tool_choice "required" or a named tool needs none',
            param="tools",
        )
    return ToolUse(offered)


def _parameters(function: Function) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}}


def _list_of_calls(functions: Sequence[Function]) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    calls = []
    for function in functions:
        parameters = dict(_parameters(function))
        # References are from the root of the schema, which is no longer theirs.
        inner = parameters.pop("$defs", {})
        definitions.update(inner if isinstance(inner, dict) else {})
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [function.name]}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    whole: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    return {**whole, "$defs": definitions} if definitions else whole


def _schema(schema: dict[str, Any]) -> StructuredOutput:
    return StructuredOutput(json_schema=json.dumps(schema))
