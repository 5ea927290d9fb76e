"""Trying it out: one question to a frontend, the answer streamed to the page, in a trace that the page knows."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Sequence

import grpc
import msgspec

from services.console.feed import encoded
from tandem.adapters.grpc_errors import error_of
from tandem.adapters.grpc_server import open_channel
from tandem.v1 import inference_pb2, inference_pb2_grpc

TIMEOUT_S = 300.0


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """What the page posts."""

    model: str
    prompt: str
    max_tokens: int = 128
    temperature: float = 0.0
    api_key: str = ""


class Trials:
    def __init__(self, frontends: Sequence[str]) -> None:
        self._channels = [open_channel(address) for address in frontends]
        self._next = itertools.cycle(self._channels)

    @property
    def possible(self) -> bool:
        return bool(self._channels)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)

    async def ask(self, question: Question) -> AsyncIterator[bytes]:
        """Server-sent events: ``trace`` first, ``text`` as it comes, then ``end`` or ``failure``."""
        trace_id = secrets.token_hex(16)
        yield encoded("trace", {"trace_id": trace_id})
        metadata = [("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01")]
        if question.api_key:
            metadata.append(("authorization", f"Bearer {question.api_key}"))
        request = inference_pb2.ChatRequest(
            model=question.model,
            messages=[inference_pb2.ChatMessage(role="user", content=question.prompt)],
            options=inference_pb2.GenerateOptions(max_tokens=question.max_tokens, temperature=question.temperature),
        )
        stub = inference_pb2_grpc.InferenceServiceStub(next(self._next))
        call = stub.Chat(request, timeout=TIMEOUT_S, metadata=metadata)
        last = inference_pb2.ChatResponse()
        try:
            async for last in call:
                if last.text or last.reasoning:
                    yield encoded("text", {"text": last.text, "reasoning": last.reasoning})
            usage = last.usage
            yield encoded(
                "end",
                {
                    "request_id": last.id,
                    "prompt_tokens": usage.prompt_tokens,
                    "cached_tokens": usage.cached_tokens,
                    "completion_tokens": usage.completion_tokens,
                },
            )
        except grpc.aio.AioRpcError as failed:
            error = error_of(failed)
            yield encoded("failure", {"code": error.code, "message": error.message})
        finally:
            call.cancel()  # the page may have gone in the middle
