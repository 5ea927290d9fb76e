"""What the frontend counts of requests that end in different ways."""

from __future__ import annotations

import asyncio
import contextlib

import openai

from tandem.errors import EngineFailed, InvalidRequest, Overloaded, WorkerLostError
from tandem.telemetry import metric_table as table
from tandem.telemetry.metric_table import Metric
from tests.integration.frontend.conftest import MODEL, Site, StartSite

HELLO = [{"role": "user", "content": "hello"}]


def count(site: Site, metric: Metric, **labels: str) -> float:
    """Sum over the series with these labels; of a histogram, the observations."""
    found = 0.0
    for known, samples in site.frontend.instruments.read():
        if known is metric:
            for sample in samples:
                named = dict(zip(metric.label_names, sample.labels, strict=True))
                if labels.items() <= named.items():
                    found += sum(sample.counts) if sample.counts else sample.value
    return found


def judged(site: Site) -> tuple[float, float, float]:
    """Offered, good, missed."""
    return tuple(count(site, m) for m in (table.OFFERED_REQUESTS, table.GOOD_REQUESTS, table.SLO_MISSES))  # type: ignore[return-value]


async def chat(site: Site, **more: object) -> None:
    await site.client.chat.completions.create(model=MODEL, messages=HELLO, **more)


async def test_a_request_with_several_answers_is_one_request(site: Site) -> None:
    site.answer("abcd")
    await chat(site, n=3)
    assert judged(site) == (1, 1, 0)
    assert count(site, table.TIME_TO_FIRST_TOKEN) == count(site, table.TIME_PER_OUTPUT_TOKEN) == 1
    assert count(site, table.REQUEST_DURATION, error_type="", gen_ai_operation_name="chat") == 1
    assert count(site, table.REQUESTS_OPEN) == 0


async def test_completions_have_their_own_operation(site: Site) -> None:
    site.answer("abcd")
    await site.client.completions.create(model=MODEL, prompt="x")
    assert count(site, table.REQUEST_DURATION, gen_ai_operation_name="text_completion") == 1


async def test_an_answer_of_one_token_has_no_pace(site: Site) -> None:
    site.answer("abcd")
    await chat(site, max_tokens=1)
    assert count(site, table.TIME_TO_FIRST_TOKEN) == 1
    assert count(site, table.TIME_PER_OUTPUT_TOKEN) == 0


async def test_what_is_refused_was_offered(site: Site) -> None:
    site.cluster.refusal = Overloaded("full")
    with contextlib.suppress(openai.RateLimitError):
        await chat(site)
    assert judged(site) == (1, 0, 1)
    assert count(site, table.SLO_MISSES, slo="answer") == 1
    assert count(site, table.FRONTEND_ERRORS, code="overloaded") == 1
    assert count(site, table.REQUEST_DURATION, error_type="overloaded") == 1
    assert count(site, table.TIME_TO_FIRST_TOKEN) == 0


async def test_a_clients_own_mistake_was_not(site: Site) -> None:
    site.cluster.refusal = InvalidRequest("the grammar does not parse")
    for body in ({}, {"temperature": -1}):
        with contextlib.suppress(openai.BadRequestError):
            await chat(site, **body)
    assert judged(site) == (0, 0, 0)
    assert count(site, table.FRONTEND_ERRORS, code="invalid_request") == 2


async def test_what_a_client_cancels_in_good_time_is_not_judged(site: Site) -> None:
    site.answer("a" * 400)
    site.cluster.step_s = 0.01
    stream = await site.client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await site.until(lambda: count(site, table.REQUEST_DURATION, error_type="cancelled") == 1)
    assert judged(site) == (0, 0, 0)


async def test_an_error_in_a_stream_counts_like_one_before_it(site: Site) -> None:
    site.answer("a" * 400)
    site.cluster.step_s = 0.01
    stream = await site.client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, frequency_penalty=0.5
    )  # with a penalty it cannot go on elsewhere
    with contextlib.suppress(openai.APIError):
        async for _ in stream:
            site.cluster.fail_running(EngineFailed("broken"))
    await site.until(lambda: count(site, table.FRONTEND_ERRORS, code="engine_failed") == 1)
    assert judged(site) == (1, 0, 1)


async def test_attempts_after_the_first_are_counted(site: Site) -> None:
    site.answer("a" * 60)
    site.cluster.step_s = 0.02
    asking = asyncio.create_task(chat(site))
    await site.until(lambda: site.cluster.running)
    site.cluster.fail_running(WorkerLostError("gone"))
    await asking
    assert judged(site) == (1, 1, 0)
    assert count(site, table.RESUBMISSIONS) == 1


async def test_a_late_first_token_is_a_miss(start_site: StartSite) -> None:
    async with start_site() as site:
        site.answer("abcd")
        await chat(site, extra_body={"ttft_slo_ms": 1})
        assert judged(site) == (1, 0, 1)
        assert count(site, table.SLO_MISSES, slo="ttft") == 1


async def test_embeddings_have_their_own_operation(start_site: StartSite) -> None:
    async with start_site(model={"task": "embed"}) as site:
        site.cluster.refusal = Overloaded("full")
        with contextlib.suppress(openai.RateLimitError):
            await site.client.embeddings.create(model=MODEL, input=["one", "two"])
        assert judged(site) == (1, 0, 1)
        assert count(site, table.REQUEST_DURATION, gen_ai_operation_name="embeddings", error_type="overloaded") == 1
        assert count(site, table.TOKEN_USAGE, gen_ai_operation_name="embeddings", gen_ai_token_type="input") == 1
