"""``tandem.v1.InferenceService``: the same generations as over HTTP, as gRPC streams."""

from __future__ import annotations

import re
import uuid
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from services.frontend.embedding import Embedder
from services.frontend.generation import Delta, Generation, GenerationRequest, Generations
from services.frontend.intake import Caller, Intake
from services.frontend.options import Options, convert
from tandem.adapters.clock import monotonic
from tandem.adapters.grpc_errors import abort_with
from tandem.errors import InvalidRequest, TandemError
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem.wire import codec

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_LISTS = ("stop", "stop_token_ids")
#: In the place of a message that could not be read: gRPC itself would log a stack trace, and say UNKNOWN.
_MALFORMED: Any = object()


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Deadlines and cancellation are gRPC's own: either ends the request wherever it is."""

    def __init__(
        self,
        intake: Intake,
        generations: Generations,
        embedder: Embedder,
        told: Callable[[TandemError], None] = lambda error: None,
    ) -> None:
        """``told`` hears each error that a client is told of."""
        self._intake = intake
        self._generations = generations
        self._embedder = embedder
        self._told = told
        #: Calls whose answer is under way.
        self.open = 0

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        generation = None
        try:
            wanted = await self._generate_request(request, context)
            generation = self._generations.begin(wanted)
            self.open += 1
            generation.start()
            async for deltas in _batches(generation):
                response = inference_pb2.GenerateResponse(
                    id=wanted.id,
                    text="".join(delta.text for delta in deltas),
                    token_ids=[token for delta in deltas for token in delta.token_ids],
                )
                _close(response, deltas, generation)
                yield response
        except TandemError as error:
            await self._refuse(context, error)
        finally:
            if generation is not None:
                self.open -= 1
                generation.close()

    async def Chat(
        self, request: inference_pb2.ChatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.ChatResponse]:
        generation = None
        try:
            wanted = await self._chat_request(request, context)
            generation = self._generations.begin(wanted)
            self.open += 1
            generation.start()
            async for deltas in _batches(generation):
                response = inference_pb2.ChatResponse(
                    id=wanted.id,
                    text="".join(delta.text for delta in deltas),
                    reasoning="".join(delta.reasoning for delta in deltas),
                )
                _close(response, deltas, generation)
                if response.text or response.reasoning or response.HasField("usage"):
                    yield response
        except TandemError as error:
            await self._refuse(context, error)
        finally:
            if generation is not None:
                self.open -= 1
                generation.close()

    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.EmbedResponse:
        self.open += 1
        try:
            return await self._embed(request, context)
        except TandemError as error:
            return await self._refuse(context, error)
        finally:
            self.open -= 1

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.ListModelsResponse:
        try:
            self._caller(request, context)
        except TandemError as error:
            await self._refuse(context, error)
        models = [
            inference_pb2.Model(name=model.name, max_model_len=model.max_model_len)
            for model in self._intake.models.values()
        ]
        return inference_pb2.ListModelsResponse(models=models)

    async def _refuse(self, context: grpc.aio.ServicerContext[Any, Any], error: TandemError) -> NoReturn:
        self._told(error)
        await abort_with(context, error)

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _generate_request(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> GenerationRequest:
        arrival_s = monotonic()
        caller = self._caller(request, context)
        model = self._intake.model(request.model)
        kind = request.WhichOneof("prompt")
        if kind == "text":
            prompt = await self._intake.tokenise(model, request.text, add_special_tokens=True, param="text")
        elif kind == "token_ids":
            prompt = list(request.token_ids.ids)
            self._intake.check_token_ids(model, prompt, param="token_ids")
        else:
            raise InvalidRequest("prompt: text or token_ids must be set", param="prompt")
        return self._intake.request(
            caller,
            model,
            [prompt],
            _options(request.options),
            id="gen-" + uuid.uuid4().hex,
            operation="text_completion",
            param=kind,
            streaming=True,
            arrival_s=arrival_s,
        )

    async def _embed(
        self, request: inference_pb2.EmbedRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inference_pb2.EmbedResponse:
        arrival_s = monotonic()
        caller = self._caller(request, context)
        model = self._embedder.model(request.model)
        if not request.inputs:
            raise InvalidRequest("inputs: at least one is needed", param="inputs")
        given: list[str | list[int]] = []
        for one in request.inputs:
            given.append(list(one.token_ids.ids) if one.WhichOneof("input") == "token_ids" else one.text)
        done = await self._embedder.embed(
            caller,
            model,
            await self._embedder.prompts(model, given, truncate=request.truncate_tokens or None, param="inputs"),
            id="embd-" + uuid.uuid4().hex,
            request_class=request.request_class or None,
            arrival_s=arrival_s,
        )
        return inference_pb2.EmbedResponse(
            embeddings=[inference_pb2.Embedding(values=array("f", vector)) for vector in done.vectors],
            usage=inference_pb2.Usage(prompt_tokens=done.prompt_tokens, cached_tokens=done.cached_tokens),
        )

    async def _chat_request(
        self, request: inference_pb2.ChatRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> GenerationRequest:
        arrival_s = monotonic()
        caller = self._caller(request, context)
        model = self._intake.model(request.model)
        if not request.messages:
            raise InvalidRequest("messages: at least one is needed", param="messages")
        text = model.render([{"role": message.role, "content": message.content} for message in request.messages])
        prompt = await self._intake.tokenise(model, text, add_special_tokens=False, param="messages")
        return self._intake.request(
            caller,
            model,
            [prompt],
            _options(request.options),
            id="chat-" + uuid.uuid4().hex,
            param="messages",
            new_parser=model.new_parser(text),
            streaming=True,
            arrival_s=arrival_s,
        )

    def _caller(self, request: object, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        if request is _MALFORMED:
            raise InvalidRequest("the bytes of this call are not its method's message")
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        traceparent = metadata.get("traceparent", "")
        return Caller(
            tenant=self._intake.tenants.of_authorization(metadata.get("authorization")),
            traceparent=traceparent if _TRACEPARENT.fullmatch(traceparent) else "",
            timeout_s=context.time_remaining(),
        )


def add_to_server(service: InferenceService, server: grpc.aio.Server) -> None:
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, _Readable(server))


class _Readable:
    """What of a server registering needs: each method gets to see also what cannot be read."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same methods come by their names, below."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        readable = {
            name: handler._replace(request_deserializer=_or_malformed(handler.request_deserializer))
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, readable),))


def _or_malformed(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return _MALFORMED

    return deserialize


async def _batches(generation: Generation) -> AsyncIterator[Sequence[Delta]]:
    while not generation.over:
        if deltas := await generation.next_batch():
            yield deltas
    if generation.error is not None:
        raise generation.error


def _close(
    response: inference_pb2.GenerateResponse | inference_pb2.ChatResponse,
    deltas: Sequence[Delta],
    generation: Generation,
) -> None:
    """The last message says how it ended."""
    finish = deltas[-1].finish
    if finish is not None:
        usage = generation.usage
        response.finish_reason = codec.finish_to_wire(finish)
        response.usage.prompt_tokens = usage.prompt_tokens
        response.usage.completion_tokens = usage.completion_tokens
        response.usage.cached_tokens = usage.cached_tokens


def _options(given: inference_pb2.GenerateOptions) -> Options:
    values: dict[str, Any] = {field.name: value for field, value in given.ListFields()}
    for name in _LISTS:
        if name in values:
            values[name] = list(values[name])
    return convert(values, Options)
