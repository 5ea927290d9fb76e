"""``/tokenize`` and ``/detokenize``, in the shapes of vLLM's: what a prompt is to a model, and back."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from services.frontend.intake import Caller, Intake
from services.frontend.openai_requests import ChatMessage, template_arguments
from services.frontend.options import TokenId, decode
from services.frontend.served_model import ServedModel
from tandem.errors import InvalidRequest


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``prompt``, or ``messages`` as the chat template renders them."""

    model: Annotated[str, Meta(max_length=256)]
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: Annotated[bool, Meta(description="default: for a prompt, not for messages")] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(max_length=256)]
    tokens: list[TokenId]


class TokenizeRoutes:
    """Each takes (body, caller, time of arrival) and gives the whole answer."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def tokenize(self, body: bytes, caller: Caller, arrival_s: float) -> bytes:
        """A text that cannot fit into the model's context is refused, as it is where it should be answered."""
        wanted = decode(_tokenize_decoder, body)
        model = self._intake.model(wanted.model)
        text, param = _text(model, wanted)
        special = wanted.add_special_tokens
        ids = await self._intake.tokenise(
            model, text, add_special_tokens=param == "prompt" if special is None else special, param=param
        )
        strings = None
        if wanted.return_token_strs:
            strings = [model.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids]
        return msgspec.json.encode(
            {"count": len(ids), "max_model_len": model.max_model_len, "tokens": list(ids), "token_strs": strings}
        )

    async def detokenize(self, body: bytes, caller: Caller, arrival_s: float) -> bytes:
        wanted = decode(_detokenize_decoder, body)
        model = self._intake.model(wanted.model)
        self._intake.check_token_ids(model, wanted.tokens, param="tokens")
        if len(wanted.tokens) > model.max_model_len:
            raise InvalidRequest(f"tokens: more than the model's context of {model.max_model_len}", param="tokens")
        return msgspec.json.encode({"prompt": model.tokenizer.decode(wanted.tokens, skip_special_tokens=False)})


def _text(model: ServedModel, wanted: TokenizeRequest) -> tuple[str, str]:
    """The text, and which field it came in."""
    if (wanted.prompt is None) == (wanted.messages is None):
        raise InvalidRequest("prompt: either prompt or messages is needed", param="prompt")
    if wanted.prompt is not None:
        return wanted.prompt, "prompt"
    messages = [message.for_template() for message in wanted.messages or ()]
    rendered = model.render(
        messages,
        tools=wanted.tools or None,
        add_generation_prompt=wanted.add_generation_prompt,
        extra=template_arguments(wanted.chat_template_kwargs),
    )
    return rendered, "messages"


_tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)
