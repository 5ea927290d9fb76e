"""A client of tandem.v1.InferenceService.

    python examples/grpc_client.py "Tell me a joke." --address 127.0.0.1:9000

As a library: ``TandemClient`` below. Failures are the classes of ``tandem.errors``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

import grpc

from tandem.adapters.grpc_errors import error_of
from tandem.errors import TandemError
from tandem.v1 import inference_pb2, inference_pb2_grpc


class TandemClient:
    """``async with TandemClient("127.0.0.1:9000") as client: ...``"""

    def __init__(self, address: str, *, api_key: str = "", timeout_s: float = 600.0) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    async def __aenter__(self) -> TandemClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def generate(
        self, model: str, prompt: str | Sequence[int], **options: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Streams the answer to a text or to token ids. ``options``: fields of GenerateOptions.

        Leaving the loop early cancels the request.
        """
        request = inference_pb2.GenerateRequest(model=model, options=inference_pb2.GenerateOptions(**options))
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids.extend(prompt)
            request.token_ids.SetInParent()
        call = self._stub.Generate(request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from None
        finally:
            call.cancel()

    async def chat(self, model: str, messages: Sequence[tuple[str, str]], **options: Any) -> AsyncIterator[str]:
        """Streams the text of the answer to (role, content) pairs."""
        request = inference_pb2.ChatRequest(
            model=model,
            messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages],
            options=inference_pb2.GenerateOptions(**options),
        )
        call = self._stub.Chat(request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield response.text
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from None
        finally:
            call.cancel()

    async def models(self) -> list[inference_pb2.Model]:
        try:
            answer = await self._stub.ListModels(
                inference_pb2.ListModelsRequest(), timeout=self._timeout_s, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from None
        return list(answer.models)


async def main() -> int:
    parser = argparse.ArgumentParser(description="Chat with a model over gRPC.")
    parser.add_argument("message")
    parser.add_argument("--address", default="127.0.0.1:9000")
    parser.add_argument("--model", default="", help="the first one that is served when left out")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--max-tokens", type=int, default=200)
    arguments = parser.parse_args()
    async with TandemClient(arguments.address, api_key=arguments.api_key) as client:
        try:
            model = arguments.model or (await client.models())[0].name
            async for text in client.chat(model, [("user", arguments.message)], max_tokens=arguments.max_tokens):
                print(text, end="", flush=True)
        except TandemError as error:
            print(f"{error.code}: {error.message}", file=sys.stderr)
            return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
