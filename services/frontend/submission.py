"""What a router gets to see of a journey's current attempt."""

from __future__ import annotations

from functools import lru_cache

from services.frontend.journey import Journey
from tandem.core.blocks import sequence_hashes
from tandem.core.types import SamplingParams
from tandem.v1 import bus_pb2
from tandem.wire import codec

#: Characters that a client chooses, of what is kept.
_SHORT = 128


def submit_message(journey: Journey, *, frontend: str, now: float) -> bytes:
    """A Submit, serialised. The prompt is the original one and every token given out so far; the budget is what is left
    of it."""
    order = journey.order
    prompt = order.prompt + journey.tokens[: journey.base].tobytes() if journey.base else order.prompt
    sampling = journey.remaining_sampling
    plain = sampling.structured_output is None and not sampling.logit_bias and not sampling.stop_token_ids
    small = plain and len(order.cache_salt) + len(order.lora) <= _SHORT
    alike = (_kept_alike if small else _alike)(
        frontend,
        order.model,
        order.tenant,
        order.request_class,
        order.ttft_slo_s,
        order.lora,
        order.cache_salt,
        order.embed,
        sampling,
    )
    own = bus_pb2.Submit(
        key={"id": order.id, "attempt": max(journey.attempt, 0), "choice": order.choice},
        rid=journey.rid,
        timeout_ms=max(1, int((order.deadline_s - now) * 1e3)),
        waited_ms=max(0, int((now - order.arrival_s) * 1e3)),
        isl_tokens=len(prompt) // 4,
        prompt=prompt,
        block_hashes=sequence_hashes(prompt, order.block_size, order.hash_root).tobytes(),
        traceparent=order.traceparent,
        avoid_workers=sorted(journey.avoid),
        local_only=journey.local_only,
    )
    return alike + own.SerializeToString()  # messages one after the other are read as one


def _alike(
    frontend: str,
    model: str,
    tenant: str,
    request_class: str,
    ttft_slo_s: float,
    lora: str,
    cache_salt: str,
    embed: bool,
    sampling: SamplingParams,
) -> bytes:
    """What many requests have in common, serialised."""
    return bus_pb2.Submit(
        model=model,
        frontend=frontend,
        tenant=tenant,
        request_class=request_class,
        ttft_slo_ms=int(ttft_slo_s * 1e3),
        sampling=codec.sampling_to_wire(sampling),
        lora=lora,
        cache_salt=cache_salt,
        embed=embed,
    ).SerializeToString()


_kept_alike = lru_cache(maxsize=256)(_alike)  # half of what a message takes, where it is one of a few
