"""Turns what a client wants into a GenerationRequest, the same way for every protocol, or refuses it with a reason."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct

from services.frontend.generation import GenerationRequest
from services.frontend.lockstep import Convoy
from services.frontend.options import Options
from services.frontend.parsers.output import NewParser
from services.frontend.served_model import ServedModel
from services.frontend.tenants import Tenants
from tandem.adapters.clock import monotonic
from tandem.adapters.deployment import Deployment, Tenant
from tandem.core.types import SamplingParams, StructuredOutput
from tandem.errors import ContextLengthExceeded, InvalidRequest, UnknownModel


class Caller(Struct, frozen=True, kw_only=True):
    """Who asks, and what came along with the request."""

    tenant: Tenant
    traceparent: str = ""
    #: The client's own time limit, seconds; None = the request class's.
    timeout_s: float | None = None


class Intake:
    def __init__(
        self,
        deployment: Deployment,
        models: Sequence[ServedModel],
        *,
        now: Callable[[], float] = monotonic,
    ) -> None:
        self.models = {model.name: model for model in models}
        self.tenants = Tenants(deployment)
        self.limits = deployment.limits
        #: Posted requests, until they are the cluster's.
        self.arrivals = Convoy()
        self._now = now
        # One thread: tokenising holds a core, and the loop needs the other.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenise")

    def reconfigure(self, deployment: Deployment) -> None:
        """Tenants and their keys, and classes; the rest needs a restart."""
        self.tenants = Tenants(deployment)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def model(self, name: str) -> ServedModel:
        found = self.models.get(name)
        if found is None:
            served = ", ".join(self.models)
            raise UnknownModel(f"no model {name!r} is served here; there are: {served}", param="model")
        return found

    async def tokenise(self, model: ServedModel, text: str, *, add_special_tokens: bool, param: str) -> Sequence[int]:
        """ContextLengthExceeded at once for a text that is too long whatever its tokens turn out to be."""
        least = model.tokenizer.least_tokens(text)
        if least >= model.max_model_len:
            raise _too_long(model, f"at least {least}", param)
        await self.arrivals.next_stage()
        try:
            tokens = await model.encode(text, self._executor, add_special_tokens=add_special_tokens)
        except UnicodeEncodeError:
            raise _surrogate(param) from None
        await self.arrivals.next_stage()
        return tokens

    async def tokenise_input(self, model: ServedModel, text: str, *, truncate: int | None, param: str) -> Sequence[int]:
        """Of an embedding: at most ``truncate`` tokens, special ones included; None = all, however many."""
        if truncate is None and model.tokenizer.least_tokens(text) > model.max_model_len:
            raise ContextLengthExceeded(
                f"an input is longer than the context length of {model.name!r}, {model.max_model_len} tokens",
                param=param,
            )
        try:
            if truncate is None:
                return await model.encode(text, self._executor, add_special_tokens=True)
            return await asyncio.get_running_loop().run_in_executor(
                self._executor, model.tokenizer.encode_truncated, text, truncate
            )
        except UnicodeEncodeError:
            raise _surrogate(param) from None

    def check_token_ids(self, model: ServedModel, ids: Sequence[int], *, param: str) -> None:
        size = model.tokenizer.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < size):
            raise InvalidRequest(f"{param}: holds a token id outside the vocabulary of {size}", param=param)

    def request(
        self,
        caller: Caller,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        options: Options,
        *,
        id: str,
        param: str,
        n: int = 1,
        streaming: bool,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        structured_output: StructuredOutput | None = None,
        new_parser: NewParser | None = None,
        operation: str = "chat",
        arrival_s: float | None = None,
    ) -> GenerationRequest:
        """``param``: the field that the prompt came in, for messages."""
        limits = self.limits
        if model.embeds:
            raise InvalidRequest(f"model {model.name!r} makes embeddings, no text", param="model")
        if not 1 <= n <= limits.max_n:
            raise InvalidRequest(f"n: must be from 1 to {limits.max_n}", param="n")
        stop = options.stop_strings
        if len(stop) > limits.max_stop:
            raise InvalidRequest(f"stop: at most {limits.max_stop} stop strings", param="stop")
        lengths = [len(prompt) for prompt in prompts]
        if not all(lengths):
            raise InvalidRequest(f"{param}: the prompt is empty", param=param)
        max_tokens = _max_tokens(model, max(lengths), options.max_tokens, param)
        sampling = _sampling(model, options, max_tokens, logprobs, prompt_logprobs, structured_output)
        request_class = self.tenants.request_class(caller.tenant, options.request_class)
        timeout_s = request_class.timeout_s
        return GenerationRequest(
            id=id,
            model=model,
            prompts=prompts,
            sampling=sampling,
            arrival_s=self._now() if arrival_s is None else arrival_s,
            timeout_s=timeout_s if caller.timeout_s is None else min(timeout_s, caller.timeout_s),
            n=n,
            stop=stop,
            skip_special_tokens=options.skip_special_tokens is not False,
            new_parser=new_parser,
            streaming=streaming,
            operation=operation,
            tenant=caller.tenant.name,
            request_class=request_class.name,
            ttft_slo_s=(options.ttft_slo_ms or 0) / 1e3,
            cache_salt=self.tenants.cache_salt(caller.tenant),
            traceparent=caller.traceparent,
            tokenised_s=self._now(),
        )


def _max_tokens(model: ServedModel, prompt_tokens: int, asked: int | None, param: str) -> int:
    """What was asked for, or all that fits."""
    room = model.max_model_len - prompt_tokens
    if room <= 0:
        raise _too_long(model, str(prompt_tokens), param)
    if asked is not None and asked > room:
        raise ContextLengthExceeded(
            f"the prompt's {prompt_tokens} tokens and max_tokens {asked} are {prompt_tokens + asked} together, but the "
            f"context length of {model.name!r} is {model.max_model_len} tokens",
            param="max_tokens",
        )
    return asked or room


def _surrogate(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: holds half of a surrogate pair, which is no character", param=param)


def _too_long(model: ServedModel, tokens: str, param: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"the prompt has {tokens} tokens, but the context length of {model.name!r} is {model.max_model_len} tokens, "
        "of which at least one is for the answer",
        param=param,
    )


def _sampling(
    model: ServedModel,
    options: Options,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    structured_output: StructuredOutput | None,
) -> SamplingParams:
    min_tokens = options.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens: {min_tokens} is over max_tokens {max_tokens}", param="min_tokens")
    size = model.tokenizer.vocab_size
    known, penalty = model.defaults, options.repetition_penalty
    for token in options.stop_token_ids or ():
        if token >= size:
            raise InvalidRequest(f"stop_token_ids: {token} is not in the vocabulary of {size}", param="stop_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=known.temperature if options.temperature is None else options.temperature,
        top_p=known.top_p if options.top_p is None else options.top_p,
        top_k=known.top_k if options.top_k is None else max(0, options.top_k),
        min_p=known.min_p if options.min_p is None else options.min_p,
        seed=None if options.seed is None else options.seed % 2**63,
        min_tokens=min_tokens,
        ignore_eos=bool(options.ignore_eos),
        stop_token_ids=tuple(options.stop_token_ids or ()),
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        repetition_penalty=known.repetition_penalty if penalty is None else penalty,
        logit_bias=_logit_bias(options.logit_bias, size) if options.logit_bias else (),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured_output=structured_output,
    )


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    found = {}
    for key, value in bias.items():
        # isdecimal alone takes digits of every script; int() would too
        if not (key.isascii() and key.isdecimal() and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias: {key[:40]!r} is no token id of the vocabulary of {vocab_size}", param="logit_bias"
            )
        if not -100.0 <= value <= 100.0:
            raise InvalidRequest(f"logit_bias: {value} is not from -100 to 100", param="logit_bias")
        found[int(key)] = value
    return tuple(sorted(found.items()))
