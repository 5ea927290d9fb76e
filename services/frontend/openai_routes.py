"""OpenAI's generating routes: from a request's body to a generation and the form of its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from msgspec import Struct

from services.frontend.generation import Delta, GenerationRequest, Usage
from services.frontend.intake import Caller, Intake
from services.frontend.openai_requests import (
    CompletionRequest,
    OpenAIRequest,
    chat_decoder,
    completion_decoder,
    template_arguments,
)
from services.frontend.openai_responses import ChatAnswer, CompletionAnswer, Echo
from services.frontend.options import decode
from services.frontend.responses_api import ResponsesAnswer, responses_decoder
from services.frontend.served_model import ServedModel
from services.frontend.tools import tool_use
from tandem.adapters.clock import new_id, unix_milliseconds
from tandem.errors import InvalidRequest, TandemError

#: They travel in one message, about 20 bytes each, and a message of the bus has its limit.
MAX_PROMPT_LOGPROBS = 200_000


class AnswerForm(Protocol):
    """How a generation is said over HTTP: ``head events* (tail | failed)``, or ``whole``."""

    def head(self) -> bytes: ...

    def events(self, deltas: Sequence[Delta]) -> bytes: ...

    def around_text(self, choice: int) -> tuple[bytes, bytes] | None:
        """What stands in ``events`` before and after a plain token's JSON string, if that is always the same."""

    def tail(self, usage: Usage) -> bytes: ...

    def failed(self, error: TandemError) -> bytes: ...

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> bytes: ...


class Exchange(Struct, frozen=True):
    """What to run, and how to say what comes of it."""

    request: GenerationRequest
    answer: AnswerForm


#: From (body, caller, time of arrival) to what is to be generated, to an answer that needs no generation, or to work
#: that ends with one and may be cancelled.
Route = Callable[[bytes, Caller, float], Awaitable[Exchange | bytes | Coroutine[Any, Any, bytes]]]


class OpenAIRoutes:
    """``chat``, ``completions`` and ``responses`` take (body, caller, time of arrival)."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def chat(self, body: bytes, caller: Caller, arrival_s: float) -> Exchange:
        wanted = decode(chat_decoder, body)
        model = self._intake.model(wanted.model)
        await self._intake.arrivals.next_stage()
        use = tool_use(wanted.tools, wanted.tool_choice, model)
        structured = wanted.structured_output
        if use.forced is not None and structured is not None:
            raise InvalidRequest("response_format: not together with tools that must be called", param="tool_choice")
        text = model.render(
            [message.for_template() for message in wanted.messages],
            tools=use.offered,
            extra=wanted.template_arguments,
        )
        # The template writes the special tokens itself.
        prompt = await self._intake.tokenise(model, text, add_special_tokens=False, param="messages")
        request = self._intake.request(
            caller,
            model,
            [prompt],
            wanted,
            id="chatcmpl-" + new_id(),
            param="messages",
            n=wanted.n or 1,
            streaming=bool(wanted.stream),
            logprobs=wanted.sampled_logprobs,
            structured_output=use.structured_output or structured,
            # An answer that the engine holds to a form has room for neither reasoning nor calls.
            new_parser=use.forced or (None if structured else model.new_parser(text, use.names)),
            arrival_s=arrival_s,
        )
        return Exchange(request, ChatAnswer(**_common(request, wanted, model)))

    async def completions(self, body: bytes, caller: Caller, arrival_s: float) -> Exchange:
        wanted = decode(completion_decoder, body)
        model = self._intake.model(wanted.model)
        n = wanted.n or 1
        if wanted.best_of not in (None, n):
            raise InvalidRequest("best_of: only the same as n", param="best_of")
        prompts = await self._prompts(model, wanted)
        prompt_logprobs = wanted.logprobs if wanted.echo else None
        if prompt_logprobs is not None and max(map(len, prompts)) * (prompt_logprobs + 1) > MAX_PROMPT_LOGPROBS:
            raise InvalidRequest(
                f"logprobs: with echo, prompt tokens times (logprobs + 1) may be {MAX_PROMPT_LOGPROBS} at most",
                param="logprobs",
            )
        request = self._intake.request(
            caller,
            model,
            prompts,
            wanted,
            id="cmpl-" + new_id(),
            operation="text_completion",
            param="prompt",
            n=n,
            streaming=bool(wanted.stream),
            logprobs=wanted.logprobs,
            prompt_logprobs=prompt_logprobs,
            arrival_s=arrival_s,
        )
        texts = [_echoed(model, prompt) for prompt in wanted.prompts] if wanted.echo else []
        echo = [Echo(text, ids) for text, ids in zip(texts, prompts, strict=False)]
        answer = CompletionAnswer(echo=echo, n=n, **_common(request, wanted, model))
        return Exchange(request, answer)

    async def responses(self, body: bytes, caller: Caller, arrival_s: float) -> Exchange:
        wanted = decode(responses_decoder, body)
        wanted.refuse_what_needs_memory()
        model = self._intake.model(wanted.model)
        await self._intake.arrivals.next_stage()
        text = model.render(wanted.messages, extra=template_arguments(wanted.chat_template_kwargs))
        prompt = await self._intake.tokenise(model, text, add_special_tokens=False, param="input")
        request = self._intake.request(
            caller,
            model,
            [prompt],
            wanted,
            id="resp_" + new_id(),
            param="input",
            streaming=bool(wanted.stream),
            structured_output=wanted.structured_output,
            new_parser=None if wanted.structured_output else model.new_parser(text),
            arrival_s=arrival_s,
        )
        return Exchange(request, ResponsesAnswer(wanted, id=request.id, created=unix_milliseconds() // 1000))

    async def _prompts(self, model: ServedModel, wanted: CompletionRequest) -> list[Sequence[int]]:
        prompts = wanted.prompts
        if len(prompts) * (wanted.n or 1) > self._intake.limits.max_n:
            raise InvalidRequest(
                f"prompt: more than {self._intake.limits.max_n} answers in one request", param="prompt"
            )
        special = wanted.add_special_tokens is not False
        found: list[Sequence[int]] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                found.append(await self._intake.tokenise(model, prompt, add_special_tokens=special, param="prompt"))
            else:
                self._intake.check_token_ids(model, prompt, param="prompt")
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
