"""OpenAI's request bodies: every field that is understood, those that are accepted without effect, and no others."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from services.frontend.options import Count, Options
from services.frontend.tools import Tool, ToolChoice
from tandem.core.types import StructuredOutput
from tandem.errors import InvalidRequest

TopLogprobs = Annotated[int, Meta(ge=0, le=20)]


class TextPart(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class FunctionCall(msgspec.Struct):
    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct):
    function: FunctionCall
    id: str = ""
    type: str = "function"


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What clients send back when they repeat an answer of ours as it was.
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: content in one string, arguments of calls as objects, nothing that is null."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: dict[str, Any] = {
            # Templates of open models know the older name only.
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        for field in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, field)) is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return message


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # no effect


class JsonSchema(msgspec.Struct):
    schema: dict[str, Any] = {}
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class OpenAIRequest(Options, kw_only=True):
    """What chat and completions have in common."""

    model: Annotated[str, Meta(max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    # Accepted without effect.
    user: str | None = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None

    @property
    def include_usage(self) -> bool:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: only with stream=true", param="stream_options")
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(OpenAIRequest, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    # Accepted without effect.
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    def __post_init__(self) -> None:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens

    @property
    def sampled_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs: only with logprobs=true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def structured_output(self) -> StructuredOutput | None:
        wanted = self.response_format
        if wanted is None:
            return None
        return structured(wanted.type, wanted.json_schema, param="response_format.json_schema")

    @property
    def template_arguments(self) -> dict[str, Any]:
        return template_arguments(self.chat_template_kwargs)


class CompletionRequest(OpenAIRequest, kw_only=True):
    prompt: Annotated[str | list[Any], Meta(description="text, texts, token ids, or several lists of token ids")]
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: Annotated[str, Meta(max_length=0)] | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more texts, or one or more lists of token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise InvalidRequest("prompt: is empty", param="prompt")
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if all(type(item) is int for item in prompt):
            return [prompt]
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in prompt):
            return prompt
        raise InvalidRequest(
            "prompt: must be a string, a list of strings, a list of token ids or a list of such lists", param="prompt"
        )


def template_arguments(extra: dict[str, Any] | None) -> dict[str, Any]:
    """``chat_template_kwargs``, which may not replace what the frontend itself says to the template."""
    if not extra:
        return {}
    reserved = {"messages", "tools", "documents", "add_generation_prompt"} & extra.keys()
    if reserved:
        raise InvalidRequest(f"chat_template_kwargs: {min(reserved)} is not for there", param="chat_template_kwargs")
    return extra


def structured(kind: str, schema: JsonSchema | None, *, param: str) -> StructuredOutput | None:
    """What holds the engine to a format's ``kind``: text, json_object or json_schema."""
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutput(json_object=True)
    if schema is None:
        raise InvalidRequest(f"{param}: missing", param=param)
    return StructuredOutput(json_schema=json.dumps(schema.schema))


def _arguments(text: str) -> Any:
    try:
        return json.loads(text) if text else {}
    except ValueError:
        return text


chat_decoder = msgspec.json.Decoder(ChatRequest)
completion_decoder = msgspec.json.Decoder(CompletionRequest)
