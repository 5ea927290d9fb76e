"""OpenAI's two generating routes: from a request's body to a generation and the form of its answer."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from services.frontend.generation import GenerationRequest
from services.frontend.intake import Caller, Intake
from services.frontend.openai_requests import (
    CompletionRequest,
    OpenAIRequest,
    chat_decoder,
    completion_decoder,
)
from services.frontend.openai_responses import Answer, ChatAnswer, CompletionAnswer
from services.frontend.options import decode
from services.frontend.served_model import ServedModel
from tandem.adapters.clock import unix_milliseconds
from tandem.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Exchange:
    """What to run, and how to say what comes of it."""

    request: GenerationRequest
    answer: Answer


Route = Callable[[bytes, Caller, float], Awaitable[Exchange]]


class OpenAIRoutes:
    """``chat`` and ``completions`` take (body, caller, time of arrival)."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def chat(self, body: bytes, caller: Caller, arrival_s: float) -> Exchange:
        wanted = decode(chat_decoder, body)
        model = self._intake.model(wanted.model)
        text = model.render(
            [message.for_template() for message in wanted.messages],
            tools=wanted.offered_tools,
            extra=wanted.template_arguments,
        )
        # The template writes the special tokens itself.
        prompt = await self._intake.tokenise(model, text, add_special_tokens=False, param="messages")
        request = self._intake.request(
            caller,
            model,
            [prompt],
            wanted,
            id="chatcmpl-" + uuid.uuid4().hex,
            param="messages",
            n=wanted.n or 1,
            streaming=bool(wanted.stream),
            logprobs=wanted.sampled_logprobs,
            structured_output=wanted.structured_output,
            arrival_s=arrival_s,
        )
        return Exchange(request, ChatAnswer(**_common(request, wanted, model)))

    async def completions(self, body: bytes, caller: Caller, arrival_s: float) -> Exchange:
        wanted = decode(completion_decoder, body)
        model = self._intake.model(wanted.model)
        n = wanted.n or 1
        if wanted.best_of not in (None, n):
            raise InvalidRequest("best_of: only the same as n", param="best_of")
        if wanted.echo and wanted.logprobs is not None:
            raise InvalidRequest("echo: not together with logprobs", param="echo")
        prompts = await self._prompts(model, wanted)
        request = self._intake.request(
            caller,
            model,
            prompts,
            wanted,
            id="cmpl-" + uuid.uuid4().hex,
            param="prompt",
            n=n,
            streaming=bool(wanted.stream),
            logprobs=wanted.logprobs,
            arrival_s=arrival_s,
        )
        echo = [_echoed(model, prompt) for prompt in wanted.prompts] if wanted.echo else ()
        return Exchange(request, CompletionAnswer(echo=echo, n=n, **_common(request, wanted, model)))

    async def _prompts(self, model: ServedModel, wanted: CompletionRequest) -> list[list[int]]:
        prompts = wanted.prompts
        if len(prompts) * (wanted.n or 1) > self._intake.limits.max_n:
            raise InvalidRequest(
                f"prompt: more than {self._intake.limits.max_n} answers in one request", param="prompt"
            )
        special = wanted.add_special_tokens is not False
        size = model.tokenizer.vocab_size
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                found.append(await self._intake.tokenise(model, prompt, add_special_tokens=special, param="prompt"))
            elif prompt and not (min(prompt) >= 0 and max(prompt) < size):
                raise InvalidRequest(f"prompt: holds a token id outside the vocabulary of {size}", param="prompt")
            else:
                found.append(prompt)
        return found


def _echoed(model: ServedModel, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def _common(request: GenerationRequest, wanted: OpenAIRequest, model: ServedModel) -> dict[str, Any]:
    return {
        "id": request.id,
        "created": unix_milliseconds() // 1000,
        "model": model.name,
        "choices": len(request.prompts) * request.n,
        "include_usage": wanted.include_usage,
        "tokenizer": model.tokenizer,
        "top_logprobs": request.sampling.logprobs or 0,
    }
