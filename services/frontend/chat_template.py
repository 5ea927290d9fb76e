"""A model's chat template, rendered as Hugging Face's transformers renders it, without transformers.

Same sandbox, same options, same extras (``raise_exception``, ``strftime_now``, ``tojson`` without HTML escapes, loop
controls, ``generation`` blocks). The template comes from the operator; messages come from clients and are data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, ext, nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import ConfigError, InvalidRequest

#: Attributes of types. A message may name any that there are.
_MOST_REMEMBERED = 1024


class _GenerationBlocks(ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here its content passes through."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Remembers what is safe: that depends on an object's type only, and is found out by a dozen checks of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._safe: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Asked of attributes that ``obj`` has."""
        asked = type(obj), attr
        safe = self._safe.get(asked)
        if safe is None:
            if len(self._safe) >= _MOST_REMEMBERED:
                self._safe.clear()
            safe = self._safe[asked] = super().is_safe_attribute(obj, attr, value)
        return safe


class ChatTemplate:
    """``tokens``: the special tokens by name (bos_token, ...). ConfigError if ``source`` is no template."""

    def __init__(self, source: str, tokens: Mapping[str, str], *, name: str = "chat template") -> None:
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, ext.loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{name}, line {error.lineno}: {error.message}") from None
        #: What every rendering sees: merged once, and not again for each.
        self._known = {**self._template.globals, **tokens}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """InvalidRequest when the template refuses these messages."""
        values = {
            **self._known,
            **(extra or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            context = Context(self._template.environment, values, self._template.name, self._template.blocks)
            return "".join(self._template.root_render_func(context))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # A template computes on what the client sent: whatever it stumbles over came from there.
            reason = str(error) or type(error).__name__
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from None
