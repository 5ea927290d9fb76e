"""What live processes give out is the table of metrics: names, types, labels, their values, buckets."""

from __future__ import annotations

import asyncio
from importlib.metadata import version

import nats
from prometheus_client.core import Metric as Family

from tandem.adapters.process_metrics import DISTRIBUTION
from tandem.telemetry import metric_table as table
from tandem.telemetry.metric_table import Kind
from tandem.wire import subjects
from tests.harness.cluster import Cluster, wait_for
from tests.harness.metrics import differences, scrape, value
from tests.integration.observability.load import CLASSES, KEYS, MODEL, SERVICES, load, served

#: Rows that a cluster which is well does not show: an error of that kind has to happen first.
UNSEEN = {table.WORKER_ERRORS.name, table.REFUSALS.name}


def domains() -> dict[str, set[str]]:
    return {"model": {MODEL}, "tenant": set(KEYS), "class": set(CLASSES), "version": {version(DISTRIBUTION)}}


def scraped(cluster: Cluster, kind: str) -> dict[str, Family]:
    [process] = cluster.processes(kind)
    return scrape(process["metrics"])


def test_every_process_gives_out_its_part_of_the_table_and_nothing_else(cluster: Cluster) -> None:
    seen = set()
    for kind in SERVICES:
        families = scraped(cluster, kind)
        assert not differences(families, kind, domains())
        missing = table.of_service(kind).keys() - families.keys()
        # What has not happened yet has no series.
        assert missing <= UNSEEN, missing
        seen |= families.keys()
    assert not {metric.name for metric in table.TABLE} - seen - UNSEEN


def test_requests_are_counted_once_by_what_they_were(cluster: Cluster) -> None:
    families, each = scraped(cluster, "frontend"), 2 * len(served)
    for tenant in KEYS:
        for name in CLASSES:
            scope = {"tenant": tenant, "class": name}
            assert value(families, table.OFFERED_REQUESTS, **scope) == each
            good = each if name == "interactive" else 0
            assert value(families, table.GOOD_REQUESTS, **scope) == good
            assert value(families, table.SLO_MISSES, slo="ttft", **scope) == each - good
            for operation in ("chat", "text_completion"):
                cell = {**scope, "gen_ai_operation_name": operation, "gen_ai_request_model": MODEL}
                for metric in (table.TIME_TO_FIRST_TOKEN, table.TIME_PER_OUTPUT_TOKEN, table.REQUEST_DURATION):
                    assert value(families, metric, **cell) == len(served), (metric.name, cell)
    answers = [s for s in families[table.TOKEN_USAGE.name].samples if s.labels["gen_ai_token_type"] == "output"]
    assert sum(s.value for s in answers if s.name.endswith("_sum")) == 8 * each * len(KEYS) * len(CLASSES)
    assert value(families, table.FRONTEND_ERRORS, code="invalid_api_key") >= 1
    assert value(families, table.FRONTEND_ERRORS, code="model_not_found") >= 1
    assert value(families, table.REQUESTS_OPEN) == 0
    assert value(families, table.LEADER_KNOWN) == 1


def test_router_and_workers_agree_with_it(cluster: Cluster) -> None:
    requests = 2 * len(served) * len(KEYS) * len(CLASSES)
    router = scraped(cluster, "router")
    assert value(router, table.PLACEMENTS, leg="prefill") == requests
    assert value(router, table.QUEUE_WAIT) == requests
    assert value(router, table.LEADS) == 1
    assert value(router, table.WORKERS_SEEN, state="alive") == 2
    assert value(router, table.IN_FLIGHT) == 0
    prefill, decode = scraped(cluster, "prefill"), scraped(cluster, "decode")
    assert value(prefill, table.WORKER_REQUESTS, outcome="handed_over") == requests
    assert value(decode, table.WORKER_REQUESTS, outcome="finished") == requests
    assert value(decode, table.KV_SECONDS) == requests
    assert value(decode, table.KV_BYTES) > 0
    assert value(prefill, table.PREFIX_PROMPT) == value(router, table.PLACED_TOKENS)
    assert 0 < value(prefill, table.PREFIX_PREDICTED) == value(router, table.PREDICTED_CACHED)
    assert 0 < value(prefill, table.PREFIX_CACHED) < value(prefill, table.PREFIX_PROMPT)
    assert value(decode, table.VLLM_GENERATION) == 8 * requests
    assert value(decode, table.VLLM_SUCCESS, finished_reason="length") == requests
    assert value(prefill, table.WORKER_EPOCH) == value(router, table.EPOCH)  # the assignments go there


def test_counters_only_grow_and_a_histograms_buckets_add_up(cluster: Cluster) -> None:
    before = scraped(cluster, "frontend")
    asyncio.run(load(cluster, rounds=1))
    after = scraped(cluster, "frontend")
    for name, family in before.items():
        if family.type == "gauge":
            continue
        later = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in after[name].samples}
        for sample in family.samples:
            assert later[sample.name, tuple(sorted(sample.labels.items()))] >= sample.value, sample
    assert value(after, table.OFFERED_REQUESTS) == value(before, table.OFFERED_REQUESTS) + 8
    for metric in table.of_service("frontend").values():
        if metric.kind is Kind.HISTOGRAM:
            whole = [s.value for s in after[metric.name].samples if s.labels.get("le") == "+Inf"]
            assert sum(whole) == value(after, metric)


def test_nonsense_on_the_bus_is_counted(cluster: Cluster) -> None:
    async def shout() -> None:
        client = await nats.connect(cluster.state()["nats_url"])
        for _ in range(50):
            await client.publish(subjects.events("default", MODEL), b"\xff\xff\xff")
        await client.close()

    asyncio.run(shout())
    wait_for(lambda: value(scraped(cluster, "router"), table.BUS_MALFORMED) >= 50, 10, "counted")

    def said() -> int:
        return sum(line.startswith("router ") and "malformed message to" in line for line in cluster.log().splitlines())

    wait_for(said, 10, "logged")
    assert said() == 1
