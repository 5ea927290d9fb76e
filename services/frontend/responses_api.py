"""OpenAI's Responses API, for text and without memory: what goes in, and the answer, whole and as typed events.

Nothing is stored: a conversation comes with every request, and a response cannot be asked for again.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from services.frontend.generation import Delta, Usage
from services.frontend.http_errors import error_fields
from services.frontend.openai_requests import JsonSchema, StreamOptions, structured
from services.frontend.options import Count, Options
from tandem.core.types import FinishReason, StructuredOutput
from tandem.errors import InvalidRequest, TandemError

_encode = msgspec.json.Encoder().encode


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: str
    # What clients send back when they repeat an answer of ours as it was.
    annotations: Any = None
    logprobs: Any = None


class InputItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message; or reasoning of an earlier answer, which models are not told again."""

    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    type: Literal["message", "reasoning"] = "message"
    summary: Any = None
    encrypted_content: Any = None
    id: str | None = None
    status: str | None = None
    phase: Any = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        if self.role is None or content is None:
            raise InvalidRequest("input: a message needs role and content", param="input")
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Any = None  # no effect


class ResponsesRequest(Options, kw_only=True):
    model: Annotated[str, Meta(max_length=256)]
    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    text: TextSettings | None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Only as if they were not there.
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    tools: list[Any] | None = None
    # Accepted without effect.
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    reasoning: Any = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    store: Any = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None

    def __post_init__(self) -> None:
        if self.max_output_tokens is not None:
            self.max_tokens = self.max_output_tokens

    def refuse_what_needs_memory(self) -> None:
        for field in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, field) is not None:
                raise InvalidRequest(
                    f"{field}: responses are not stored here; send the whole conversation as input", param=field
                )
        if self.background:
            raise InvalidRequest("background: responses are not stored here", param="background")
        if self.tools:
            raise InvalidRequest("tools: not in responses; use /v1/chat/completions", param="tools")

    @property
    def messages(self) -> list[dict[str, Any]]:
        items = self.input
        if isinstance(items, str):
            said = [{"role": "user", "content": items}]
        else:
            said = [item.for_template() for item in items if item.type == "message"]
        return [{"role": "system", "content": self.instructions}, *said] if self.instructions else said

    @property
    def structured_output(self) -> StructuredOutput | None:
        wanted = self.text.format if self.text is not None else None
        if wanted is None:
            return None
        schema = None if wanted.schema is None else JsonSchema(schema=wanted.schema)
        return structured(wanted.type, schema, param="text.format.schema")


class _Item:
    """A part of the output: the model's reasoning, or its message."""

    def __init__(self, index: int, *, reasoning: bool) -> None:
        self.index = index
        self.id = ("rs_" if reasoning else "msg_") + uuid.uuid4().hex
        self.text: list[str] = []
        self.reasoning = reasoning
        self.kind = "reasoning_text" if reasoning else "output_text"

    def part(self) -> dict[str, Any]:
        more: dict[str, Any] = {} if self.reasoning else {"annotations": [], "logprobs": []}
        return {"type": self.kind, "text": "".join(self.text), **more}

    def fields(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part()]
        if self.reasoning:
            return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status}
        return {"id": self.id, "type": "message", "role": "assistant", "content": content, "status": status}


class ResponsesAnswer:
    """One message of text, after the reasoning if there is any. The last event holds the whole, and how it ended."""

    def __init__(self, request: ResponsesRequest, *, id: str, created: int) -> None:
        self._items: list[_Item] = []
        self._incomplete = False
        self._sent = 0
        self._fields: dict[str, Any] = {
            "id": id,
            "object": "response",
            "created_at": created,
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "user": request.user,
        }

    # -- streamed --------------------------------------------------------------------------------------------------

    def head(self) -> bytes:
        begun = self._response("in_progress", [])
        created = self._event("response.created", response=begun)
        return created + self._event("response.in_progress", response=begun)

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """One event for all the text that there is, and one for the reasoning before it."""
        self._note_end(deltas)
        return self._said("".join(delta.reasoning for delta in deltas), reasoning=True) + self._said(
            "".join(delta.text for delta in deltas), reasoning=False
        )

    def around_text(self, choice: int) -> None:
        """Every event has its number."""

    def tail(self, usage: Usage) -> bytes:
        status = self._status
        opened = b"" if self._items and not self._items[-1].reasoning else self._next_item(reasoning=False)
        closed = self._close(self._items[-1], status)
        kind = f"response.{status}"
        return opened + closed + self._event(kind, response=self._response(status, self._output(status), usage))

    def failed(self, error: TandemError) -> bytes:
        fields = error_fields(error)
        kept = {name: value for name, value in fields.items() if name != "type"}
        response = self._response("failed", [])
        response["error"] = {"code": error.code, "message": error.message}
        return self._event("error", **kept) + self._event("response.failed", response=response)

    # -- whole -----------------------------------------------------------------------------------------------------

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        self.events(deltas)
        if not self._items or self._items[-1].reasoning:
            self._items.append(_Item(len(self._items), reasoning=False))
        return _encode(self._response(self._status, self._output(self._status), usage))

    # -- inside ----------------------------------------------------------------------------------------------------

    @property
    def _status(self) -> str:
        return "incomplete" if self._incomplete else "completed"

    def _note_end(self, deltas: Sequence[Delta]) -> None:
        self._incomplete = self._incomplete or any(delta.finish is FinishReason.LENGTH for delta in deltas)

    def _output(self, status: str) -> list[dict[str, Any]]:
        """Only the last item can be incomplete."""
        return [item.fields(status if item is self._items[-1] else "completed") for item in self._items]

    def _said(self, text: str, *, reasoning: bool) -> bytes:
        if not text:
            return b""
        opened = b"" if self._items and self._items[-1].reasoning == reasoning else self._next_item(reasoning=reasoning)
        item = self._items[-1]
        item.text.append(text)
        more: dict[str, Any] = {} if reasoning else {"logprobs": []}
        return opened + self._of_part(item, f"response.{item.kind}.delta", delta=text, **more)

    def _next_item(self, *, reasoning: bool) -> bytes:
        closed = self._close(self._items[-1], "completed") if self._items else b""
        item = _Item(len(self._items), reasoning=reasoning)
        self._items.append(item)
        added = self._event("response.output_item.added", output_index=item.index, item=item.fields("in_progress"))
        return closed + added + self._of_part(item, "response.content_part.added", part=item.part())

    def _close(self, item: _Item, status: str) -> bytes:
        more: dict[str, Any] = {} if item.reasoning else {"logprobs": []}
        return (
            self._of_part(item, f"response.{item.kind}.done", text="".join(item.text), **more)
            + self._of_part(item, "response.content_part.done", part=item.part())
            + self._event("response.output_item.done", output_index=item.index, item=item.fields(status))
        )

    def _response(self, status: str, output: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        return {
            **self._fields,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": None if usage is None else _usage(usage),
        }

    def _of_part(self, item: _Item, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=item.id, output_index=item.index, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._sent
        self._sent += 1
        data = _encode({"type": kind, "sequence_number": number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


responses_decoder = msgspec.json.Decoder(ResponsesRequest)
