"""``/v1/embeddings``, as OpenAI's clients know it."""

from __future__ import annotations

import base64
import uuid
from array import array
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from services.frontend.embedding import MAX_INPUTS, Embedder, Embeddings
from services.frontend.intake import Caller
from services.frontend.options import decode
from services.frontend.served_model import ServedModel
from tandem.errors import InvalidRequest


class EmbeddingsRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(max_length=256)]
    input: Annotated[str | list[Any], Meta(description="text, texts, token ids, or several lists of token ids")]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1, description="only the model's own number")] | None = None
    truncate_prompt_tokens: (
        Annotated[int, Meta(ge=-1, le=2**31 - 1, description="cut longer inputs; -1: to the model's context")] | None
    ) = None
    request_class: Annotated[str, Meta(description="a class of the deployment file")] | None = None
    # Accepted without effect.
    user: str | None = None
    metadata: Any = None

    @property
    def inputs(self) -> Sequence[str | Sequence[int]]:
        given = self.input
        if isinstance(given, str):
            return [given]
        if not given:
            raise InvalidRequest("input: is empty", param="input")
        if len(given) > MAX_INPUTS and type(given[0]) is not int:
            raise InvalidRequest(f"input: at most {MAX_INPUTS} inputs in one request", param="input")
        if all(isinstance(item, str) for item in given):
            return given
        if all(type(item) is int for item in given):
            return [given]
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in given):
            return given
        raise InvalidRequest(
            "input: must be a string, a list of strings, a list of token ids or a list of such lists", param="input"
        )


class EmbeddingsRoute:
    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    async def embeddings(self, body: bytes, caller: Caller, arrival_s: float) -> Coroutine[Any, Any, bytes]:
        """The work itself, which whoever awaits it may cancel."""
        wanted = decode(_decoder, body)
        model = self._embedder.model(wanted.model)
        truncate = wanted.truncate_prompt_tokens
        if truncate == 0:
            raise InvalidRequest("truncate_prompt_tokens: must be -1 or at least 1", param="truncate_prompt_tokens")
        limit = model.max_model_len if truncate == -1 else truncate
        prompts = await self._embedder.prompts(model, wanted.inputs, truncate=limit, param="input")
        return self._run(wanted, model, prompts, caller, arrival_s)

    async def _run(
        self,
        wanted: EmbeddingsRequest,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        caller: Caller,
        arrival_s: float,
    ) -> bytes:
        done = await self._embedder.embed(
            caller,
            model,
            prompts,
            id="embd-" + uuid.uuid4().hex,
            request_class=wanted.request_class,
            arrival_s=arrival_s,
        )
        size = len(done.vectors[0]) // 4
        if wanted.dimensions not in (None, size):
            raise InvalidRequest(
                f"dimensions: {model.name!r} makes vectors of {size} values and no others", param="dimensions"
            )
        return _answer(done, model.name, in_base64=wanted.encoding_format == "base64")


def floats(vector: bytes) -> array[float]:
    return array("f", vector)


def _answer(done: Embeddings, model: str, *, in_base64: bool) -> bytes:
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector).decode() if in_base64 else floats(vector).tolist(),
        }
        for index, vector in enumerate(done.vectors)
    ]
    usage = {
        "prompt_tokens": done.prompt_tokens,
        "total_tokens": done.prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})


_decoder = msgspec.json.Decoder(EmbeddingsRequest)
