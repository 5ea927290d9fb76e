"""What a router gets to see of a journey's current attempt."""

from __future__ import annotations

from services.frontend.journey import Journey
from tandem.core.blocks import sequence_hashes
from tandem.v1 import bus_pb2
from tandem.wire import codec


def submit_message(journey: Journey, *, frontend: str, now: float) -> bus_pb2.Submit:
    """The prompt is the original one and every token given out so far; the budget is what is left of it."""
    order = journey.order
    prompt = order.prompt + journey.tokens[: journey.base].tobytes() if journey.base else order.prompt
    return bus_pb2.Submit(
        key=codec.key_to_wire(journey.key),
        model=order.model,
        frontend=frontend,
        rid=journey.rid,
        tenant=order.tenant,
        request_class=order.request_class,
        timeout_ms=max(1, int((order.deadline_s - now) * 1e3)),
        ttft_slo_ms=int(order.ttft_slo_s * 1e3),
        waited_ms=max(0, int((now - order.arrival_s) * 1e3)),
        isl_tokens=len(prompt) // 4,
        prompt=prompt,
        block_hashes=sequence_hashes(prompt, order.block_size, order.hash_root).tobytes(),
        sampling=codec.sampling_to_wire(journey.remaining_sampling),
        lora=order.lora,
        cache_salt=order.cache_salt,
        traceparent=order.traceparent,
        avoid_workers=sorted(journey.avoid),
        local_only=journey.local_only,
        embed=order.embed,
    )
