"""Embeddings, whatever protocol asks for them: one journey per input, and one vector from each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.frontend.cluster import Cluster
from services.frontend.intake import Caller, Intake
from services.frontend.journey import Journey
from services.frontend.order import Consumer, Order, Outcome
from services.frontend.served_model import ServedModel
from services.frontend.tracing import RequestTraces
from tandem.adapters.clock import monotonic
from tandem.core.blocks import root_hash, token_bytes
from tandem.core.types import SamplingParams
from tandem.errors import Cancelled, ContextLengthExceeded, InternalError, InvalidRequest, TandemError

#: As at OpenAI: inputs of one request, and the tokens of all of them together.
MAX_INPUTS = 2_048
MAX_TOKENS = 300_000


@dataclass(frozen=True, slots=True)
class Embeddings:
    """``vectors``: little-endian f32, in the order of the inputs."""

    vectors: Sequence[bytes]
    prompt_tokens: int
    cached_tokens: int


class Embedder:
    def __init__(self, intake: Intake, cluster: Cluster, traces: RequestTraces | None = None) -> None:
        self._intake = intake
        self._cluster = cluster
        self._traces = traces
        self._refusal: TandemError | None = None
        #: Called at each one's end: (model, tenant, class, arrival, tokens, what it failed of).
        self.on_end: Callable[[str, str, str, float, int, TandemError | None], None] = lambda *ended: None

    def refuse(self, error: TandemError) -> None:
        """None begins from now on."""
        self._refusal = error

    def model(self, name: str) -> ServedModel:
        """InvalidRequest for one that makes text."""
        model = self._intake.model(name)
        if not model.embeds:
            raise InvalidRequest(f"model {name!r} makes text, no embeddings", param="model")
        return model

    async def prompts(
        self,
        model: ServedModel,
        inputs: Sequence[str | Sequence[int]],
        *,
        truncate: int | None,
        param: str,
    ) -> list[Sequence[int]]:
        """Token ids of each. ``truncate``: the most tokens of an input that count; None = refuse what is too long."""
        if len(inputs) > MAX_INPUTS:
            raise InvalidRequest(f"{param}: at most {MAX_INPUTS} inputs in one request", param=param)
        limit = None if truncate is None else min(truncate, model.max_model_len)
        found: list[Sequence[int]] = []
        total = 0
        for given in inputs:
            prompt: Sequence[int]
            if isinstance(given, str):
                prompt = await self._intake.tokenise_input(model, given, truncate=limit, param=param)
            else:
                self._intake.check_token_ids(model, given, param=param)
                prompt = given[:limit]
            if not prompt:
                raise InvalidRequest(f"{param}: an input is empty", param=param)
            if len(prompt) > model.max_model_len:
                raise ContextLengthExceeded(
                    f"an input has {len(prompt)} tokens, but the context length of {model.name!r} is "
                    f"{model.max_model_len} tokens",
                    param=param,
                )
            total += len(prompt)
            if total > MAX_TOKENS:
                raise InvalidRequest(f"{param}: more than {MAX_TOKENS} tokens in one request", param=param)
            found.append(prompt)
        return found

    async def embed(
        self,
        caller: Caller,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        *,
        id: str,
        request_class: str | None,
        arrival_s: float,
    ) -> Embeddings:
        """Raises the error of the first input that fails, or what was given to ``refuse``. Whoever cancels this
        cancels all of it."""
        if self._refusal is not None:
            raise self._refusal
        chosen = self._intake.tenants.request_class(caller.tenant, request_class)
        timeout_s = chosen.timeout_s if caller.timeout_s is None else min(chosen.timeout_s, caller.timeout_s)
        salt = self._intake.tenants.cache_salt(caller.tenant)
        root = root_hash(model.name, "", salt)
        loop = asyncio.get_running_loop()
        inputs = [_Input(loop.create_future()) for _ in prompts]
        trace = self._traces.begin(caller.traceparent) if self._traces is not None else None
        begun_s = monotonic()
        error: TandemError | None = None
        cached = 0
        try:
            for index, (prompt, consumer) in enumerate(zip(prompts, inputs, strict=True)):
                order = Order(
                    id=id,
                    model=model.name,
                    prompt=token_bytes(prompt),
                    sampling=SamplingParams(max_tokens=0),
                    arrival_s=arrival_s,
                    deadline_s=arrival_s + timeout_s,
                    choice=index,
                    tenant=caller.tenant.name,
                    request_class=chosen.name,
                    cache_salt=salt,
                    block_size=model.block_size,
                    hash_root=root,
                    traceparent=trace.context.header if trace is not None else caller.traceparent,
                    restartable=True,
                    embed=True,
                )
                consumer.journey = self._cluster.begin(order, consumer)
            done = await asyncio.gather(*(consumer.answer for consumer in inputs))
            cached = sum(outcome.cached_tokens for outcome in done)
        except TandemError as failure:
            error = failure
            raise
        except asyncio.CancelledError:
            error = Cancelled("cancelled by the client")
            raise
        finally:
            tokens = sum(map(len, prompts))
            self.on_end(model.name, caller.tenant.name, chosen.name, arrival_s, tokens, error)
            journeys = [consumer.journey for consumer in inputs if consumer.journey is not None]
            for journey in journeys:
                self._cluster.cancel(journey)
            if trace is not None and self._traces is not None and journeys:
                self._traces.embedded(trace, journeys, error, tokenised_s=(arrival_s, begun_s), cached_tokens=cached)
        return Embeddings([outcome.embedding for outcome in done], sum(map(len, prompts)), cached)


class _Input(Consumer):
    """One of the inputs, until its vector is there."""

    __slots__ = ("answer", "journey")

    def __init__(self, answer: asyncio.Future[Outcome]) -> None:
        self.answer = answer
        self.journey: Journey | None = None

    def ended(self, outcome: Outcome) -> None:
        if self.answer.done():  # cancelled with the rest
            return
        if outcome.error is not None:
            self.answer.set_exception(outcome.error)
        elif not outcome.embedding:
            self.answer.set_exception(InternalError("the worker ended without an embedding"))
        else:
            self.answer.set_result(outcome)
