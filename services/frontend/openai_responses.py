"""OpenAI's response bodies, streamed and whole, written from a generation's deltas.

What is the same in every event of a stream is encoded once: an event is then three pieces of bytes around one string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from services.frontend.detokenizer import detokenizer
from services.frontend.generation import Delta, Usage
from services.frontend.http_errors import error_body
from services.frontend.order import Positions
from services.frontend.parsers.output import Call
from services.frontend.tokenizer import Tokenizer
from tandem.core.types import FinishReason
from tandem.errors import TandemError
from tandem.v1 import types_pb2

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
#: JSON has no minus infinity.
LEAST_LOGPROB = -9999.0

_encode = msgspec.json.Encoder().encode


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class Answer:
    """One response. ``choices`` is how many there are; ``include_usage`` asks for the usage event of a stream."""

    stream_object: str
    whole_object: str

    def __init__(
        self,
        *,
        id: str,
        created: int,
        model: str,
        choices: int,
        include_usage: bool,
        tokenizer: Tokenizer,
        top_logprobs: int = 0,
    ) -> None:
        self._id = id
        self._created = created
        self._model = model
        self._choices = choices
        self._include_usage = include_usage
        self._tokenizer = tokenizer
        self._top_logprobs = top_logprobs
        #: How many calls of tools each choice has told of.
        self._calls = [0] * choices
        opening = _encode({"id": id, "object": self.stream_object, "created": created, "model": model})
        self._prefix = b"data: " + opening[:-1] + b',"choices":['
        self._suffix = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._text_prefix = [self._prefix + b'{"index":%d,' % index + self.text_opening for index in range(choices)]
        self._text_suffix = self.text_closing + b',"logprobs":null,"finish_reason":null}' + self._suffix

    #: Around the JSON string of a choice's text.
    text_opening: bytes
    text_closing: bytes

    # -- streamed --------------------------------------------------------------------------------------------------

    def head(self) -> bytes:
        """Events before the first delta."""
        raise NotImplementedError

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """An event for each token that says something."""
        out = []
        for delta in deltas:
            if delta.positions is not None or delta.finish is not None or delta.reasoning or delta.calls:
                out.append(self._full_event(delta))
            elif delta.pieces and delta.text:
                opening, closing = self.around_text(delta.choice)
                said = map(_encode, filter(None, delta.pieces))
                out += opening, (closing + opening).join(said), closing
            elif delta.text:
                opening, closing = self.around_text(delta.choice)
                out += opening, _encode(delta.text), closing
        return b"".join(out)

    def around_text(self, choice: int) -> tuple[bytes, bytes]:
        return self._text_prefix[choice], self._text_suffix

    def tail(self, usage: Usage) -> bytes:
        if not self._include_usage:
            return DONE
        return self._prefix + b'],"usage":' + _encode(usage_fields(usage)) + b"}\n\n" + DONE

    def failed(self, error: TandemError) -> bytes:
        return event(error_body(error)) + DONE

    def _full_event(self, delta: Delta) -> bytes:
        choice = {
            "index": delta.choice,
            **self._streamed_choice(delta),
            "logprobs": None if delta.positions is None else self._logprobs([delta]),
            "finish_reason": None if delta.finish is None else self._finish(delta.choice, delta.finish),
        }
        return self._prefix + _encode(choice) + self._suffix

    # -- whole -----------------------------------------------------------------------------------------------------

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        by_choice: list[list[Delta]] = [[] for _ in range(self._choices)]
        for delta in deltas:
            by_choice[delta.choice].append(delta)
        return _encode(
            {
                "id": self._id,
                "object": self.whole_object,
                "created": self._created,
                "model": self._model,
                "choices": [
                    {
                        "index": index,
                        **self._whole_choice(index, mine),
                        "logprobs": self._logprobs(mine) if any(d.positions is not None for d in mine) else None,
                        # Which the last of them says.
                        "finish_reason": self._finish(index, next(d.finish for d in mine if d.finish is not None)),
                    }
                    for index, mine in enumerate(by_choice)
                ],
                "usage": usage_fields(usage),
            }
        )

    # -- what differs ----------------------------------------------------------------------------------------------

    def _streamed_choice(self, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        raise NotImplementedError

    def _finish(self, choice: int, reason: FinishReason) -> str:
        """Why it ended."""
        return "stop" if reason is FinishReason.STOP else "length"

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        raise NotImplementedError

    def _positions(self, deltas: Sequence[Delta]) -> list[Sequence[types_pb2.TokenLogprob]]:
        return [position.tokens for delta in deltas for position in delta.positions or ()]


class ChatAnswer(Answer):
    stream_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    text_opening = b'"delta":{"content":'
    text_closing = b"}"

    def head(self) -> bytes:
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b"".join(self._prefix + b'{"index":%d,' % i + role + self._suffix for i in range(self._choices))

    def _streamed_choice(self, delta: Delta) -> dict[str, Any]:
        news: dict[str, Any] = {}
        if delta.reasoning:
            news["reasoning_content"] = delta.reasoning
        if delta.text or (delta.positions is not None and not delta.reasoning):
            news["content"] = delta.text
        if delta.calls:
            first = self._calls[delta.choice]
            news["tool_calls"] = [{"index": first + i, **_call(call)} for i, call in enumerate(delta.calls)]
            self._calls[delta.choice] += len(delta.calls)
        return {"delta": news}

    def _whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "".join(d.text for d in deltas), "refusal": None}
        if reasoning := "".join(delta.reasoning for delta in deltas):
            message["reasoning_content"] = reasoning
        if calls := [_call(call) for delta in deltas for call in delta.calls]:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
            self._calls[index] = len(calls)
        return {"message": message}

    def _finish(self, choice: int, reason: FinishReason) -> str:
        if reason is FinishReason.STOP and self._calls[choice]:
            return "tool_calls"
        return super()._finish(choice, reason)

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        content = []
        for candidates in self._positions(deltas):
            # The sampled one comes first, and may be one of the top ones as well.
            top = sorted((c for c in candidates if c.rank <= self._top_logprobs), key=lambda c: c.rank)
            content.append({**self._one(candidates[0]), "top_logprobs": [self._one(c) for c in top]})
        return {"content": content, "refusal": None}

    def _one(self, candidate: types_pb2.TokenLogprob) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(candidate.token_id)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(candidate.logprob, LEAST_LOGPROB),
            "bytes": list(data),
        }


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is repeated: as it came, and what it was to the model."""

    text: str
    token_ids: Sequence[int]


class CompletionAnswer(Answer):
    stream_object = whole_object = "text_completion"
    text_opening = b'"text":'
    text_closing = b""

    def __init__(self, *, echo: Sequence[Echo] = (), n: int = 1, **rest: Any) -> None:
        """``echo``: the prompts, where they are to be repeated before each of their ``n`` answers."""
        super().__init__(**rest)
        self._echo = [prompt for prompt in echo for _ in range(n)]
        self._offsets = [len(prompt.text) for prompt in self._echo] or [0] * self._choices

    def head(self) -> bytes:
        return self.events([Delta(index, prompt.text) for index, prompt in enumerate(self._echo)])

    def _streamed_choice(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def _whole_choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        text = "".join(delta.text for delta in deltas)
        return {"text": (self._echo[index].text if self._echo else "") + text}

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        found = _Columns()
        for delta in deltas:
            if delta.prompt_positions is not None:
                self._prompt_logprobs(found, self._echo[delta.choice], delta.prompt_positions)
            for candidates in self._positions([delta]):
                self._add(found, candidates[0].token_id, candidates, self._offsets[delta.choice])
            self._offsets[delta.choice] += len(delta.text)
        return msgspec.structs.asdict(found)

    def _prompt_logprobs(self, found: _Columns, prompt: Echo, positions: Positions) -> None:
        """The first token of a prompt has no log-probability: nothing comes before it."""
        words = detokenizer(self._tokenizer)
        offset = 0
        for token, position in zip(prompt.token_ids, positions, strict=True):
            self._add(found, token, position.tokens, offset)
            offset += len(words.push(token))

    def _add(self, found: _Columns, token: int, candidates: Sequence[types_pb2.TokenLogprob], offset: int) -> None:
        found.tokens.append(self._text(token))
        found.token_logprobs.append(max(candidates[0].logprob, LEAST_LOGPROB) if candidates else None)
        tops = {self._text(c.token_id): max(c.logprob, LEAST_LOGPROB) for c in candidates}
        found.top_logprobs.append(tops or None)
        found.text_offset.append(offset)

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")


class _Columns(msgspec.Struct):
    """The older API's log-probabilities."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
