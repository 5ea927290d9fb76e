"""What a frontend says of its requests when they are over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from tandem.errors import Overloaded, WorkerLostError
from tandem.telemetry import spans
from tandem.telemetry.propagation import parse
from tandem.telemetry.sampling import Sampler, SamplingPolicy
from tests.harness.kept_spans import KeptSpans
from tests.integration.frontend.conftest import MODEL, Site, StartSite

ROOT = f"chat {MODEL}"
HELLO = [{"role": "user", "content": "a secret of mine"}]


@pytest.fixture
async def kept(site: Site) -> AsyncIterator[KeptSpans]:
    """Nothing is sampled unless the client says so."""
    kept = KeptSpans()
    site.frontend.tracing.sink = kept
    site.frontend.tracing.sampler = Sampler(SamplingPolicy(ratio=0.0, slow_ttft_s=60.0))
    yield kept
    assert "secret" not in str(kept.records)


def traceparent(flags: str, trace_id: str = "5a" * 16) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-{'ab' * 8}-{flags}"}


async def test_the_clients_context_goes_on_to_the_router(site: Site, kept: KeptSpans) -> None:
    site.answer("hello")
    await site.client.chat.completions.create(
        model=MODEL, messages=HELLO, n=2, seed=4, top_p=0.5, extra_headers=traceparent("01")
    )
    (root,), (tokenize,) = kept.named(ROOT), kept.named("tokenize")
    sent = [parse(submit.traceparent) for submit in site.cluster.submits]
    assert [(c.trace_id, c.span_id, c.sampled) for c in sent if c] == [(int("5a" * 16, 16), root.span_id, True)] * 2
    assert root.parent_id == int("ab" * 8, 16) and tokenize.parent_id == root.span_id
    assert root.start_s <= tokenize.start_s <= tokenize.end_s <= root.end_s
    about = root.attributes
    assert (about[spans.CHOICE_COUNT], about[spans.SEED], about[spans.TOP_P]) == (2, 4, 0.5)
    assert about[spans.FINISH_REASONS] == ["stop", "stop"] and about[spans.WHY] == "sampled"


async def test_without_a_collector_the_clients_context_goes_through_as_it_is(site: Site) -> None:
    site.answer("hello")
    await site.client.chat.completions.create(model=MODEL, messages=HELLO, extra_headers=traceparent("00"))
    assert site.cluster.submits[-1].traceparent == traceparent("00")["traceparent"]


async def test_what_went_well_and_was_not_sampled_is_not_told(site: Site, kept: KeptSpans) -> None:
    site.answer("hello")
    await site.client.chat.completions.create(model=MODEL, messages=HELLO)
    context = parse(site.cluster.submits[-1].traceparent)
    assert context is not None and not context.sampled, "the decision goes along"
    assert kept.records == []


async def test_a_refusal_is_told_though_nobody_sampled_it(site: Site, kept: KeptSpans) -> None:
    site.cluster.refusal = Overloaded("too many wait")
    with pytest.raises(openai.RateLimitError):
        await site.client.chat.completions.create(model=MODEL, messages=HELLO)
    (root,), (queue,) = kept.named(ROOT), kept.named("queue")
    assert root.error == ("overloaded", "too many wait") and root.attributes[spans.ERROR_TYPE] == "overloaded"
    assert root.attributes[spans.WHY] == "failed"
    assert queue.attributes[spans.RECONSTRUCTED] is True


async def test_a_flood_of_failures_is_told_in_part(site: Site, kept: KeptSpans) -> None:
    site.frontend.tracing.sampler = Sampler(SamplingPolicy(ratio=0.0, late_per_s=2.0))
    site.cluster.refusal = Overloaded("too many wait")

    async def ask() -> None:
        with pytest.raises(openai.RateLimitError):
            await site.client.chat.completions.create(model=MODEL, messages=HELLO)

    began = asyncio.get_running_loop().time()
    await asyncio.gather(*(ask() for _ in range(40)))
    took_s = asyncio.get_running_loop().time() - began
    assert 2 <= len(kept.named(ROOT)) <= 3 + 2 * took_s


async def test_slos_that_are_read_again_say_who_is_late(start_site: StartSite, tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    told = []
    async with start_site(deployment=str(file)) as site:
        kept = site.frontend.tracing.sink = KeptSpans()
        site.frontend.tracing.sampler = Sampler(SamplingPolicy(ratio=0.0, slow_ttft_s=60.0))
        site.cluster.step_s = 0.02
        for slo_s in ("30.0", "0.001"):
            model = f"{{name: {MODEL}, path: nowhere, pools: [{{role: aggregated, engine: sim}}]}}"
            file.write_text(f"{{models: [{model}], classes: [{{name: interactive, ttft_slo_s: {slo_s}}}]}}")
            site.frontend.reload()
            site.answer("hello")
            await site.client.chat.completions.create(model=MODEL, messages=HELLO)
            told.append([root.attributes[spans.WHY] for root in kept.named(ROOT)])
    assert told == [[], ["slow"]]


async def test_a_client_that_leaves_is_no_failure(site: Site, kept: KeptSpans) -> None:
    site.answer("on and on " * 40)
    site.cluster.step_s = 0.02
    for flags in ("00", "01"):
        stream = await site.client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, extra_headers=traceparent(flags)
        )
        await anext(aiter(stream))
        await stream.close()
        await site.until(lambda: not site.cluster.running)
    await site.until(lambda: kept.named(ROOT))
    (root,) = kept.named(ROOT)
    assert root.error is None and [moment.name for moment in root.events][-1] == "cancelled"


async def test_a_lost_attempt_is_told(site: Site, kept: KeptSpans) -> None:
    site.answer("hello")
    site.cluster.refusal = WorkerLostError("worker w is gone")
    call = asyncio.create_task(
        site.client.chat.completions.create(model=MODEL, messages=HELLO, extra_headers=traceparent("01"))
    )
    await site.until(lambda: site.cluster.submits)
    site.cluster.refusal = None
    await call
    (root,) = kept.named(ROOT)
    told = [(moment.name, moment.attributes.get(spans.ERROR_TYPE)) for moment in root.events]
    assert ("attempt_failed", "worker_lost") in told and ("retry", None) in told
    assert root.attributes[spans.ATTEMPTS] == len(site.cluster.submits) >= 2 and root.error is None


async def test_embeddings_are_traced_too(start_site: StartSite) -> None:
    async with start_site(model={"task": "embed"}) as site:
        kept = site.frontend.tracing.sink = KeptSpans()
        site.frontend.tracing.sampler = Sampler(SamplingPolicy(ratio=1.0))
        site.cluster.refusal = Overloaded("too many wait")
        with pytest.raises(openai.RateLimitError):
            await site.client.embeddings.create(model=MODEL, input=["one", "two"])
        (root,) = kept.named(f"embeddings {MODEL}")
        assert root.attributes[spans.OPERATION] == "embeddings" and root.attributes[spans.ERROR_TYPE] == "overloaded"
        contexts = {submit.traceparent for submit in site.cluster.submits}
        (context,) = [parse(one) for one in contexts]
        assert context is not None and context.span_id == root.span_id
