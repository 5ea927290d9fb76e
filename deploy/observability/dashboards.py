"""Writes the Grafana dashboards in grafana/ from the panels below.

python deploy/observability/dashboards.py           write them
python deploy/observability/dashboards.py --check   fail if a file is not what this says

Each panel is a title, queries and a unit. A panel that shows nothing while all is well says so (``until``); a test
asks a live Prometheus for every other one's data.
"""

from __future__ import annotations

import sys
from pathlib import Path

from panels import Dashboard, Panel, Requests, Row, as_json, highest, quantile, quantiles, rate, share, total

FOLDER = Path(__file__).parent / "grafana"

TTFT = "gen_ai_server_time_to_first_token_seconds"
TPOT = "gen_ai_server_time_per_output_token_seconds"
DURATION = "gen_ai_server_request_duration_seconds"
USAGE = "gen_ai_client_token_usage"


def attainment(where: str, by: str, legend: str) -> tuple[tuple[str, str], ...]:
    return ((share("tandem_good_requests_total", "tandem_offered_requests_total", where, by), legend),)


def tokens(where: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (rate(f"{USAGE}_sum", ", ".join(filter(None, (where, f'gen_ai_token_type="{kind}"')))), name)
        for kind, name in (("input", "prompt"), ("output", "answer"))
    )


def hit_rates(where: str) -> tuple[tuple[str, str], ...]:
    return (
        (
            share("tandem_router_predicted_cached_tokens_total", "tandem_router_placed_prompt_tokens_total", where),
            "predicted when placed",
        ),
        (share("tandem_worker_cached_tokens_total", "tandem_worker_prompt_tokens_total", where), "found by engines"),
    )


# -- overview ----------------------------------------------------------------------------------------------------------

OVERVIEW = Dashboard(
    uid="tandem-overview",
    title="Tandem: overview",
    about="Is it well, and if not, which part is not.",
    rows=(
        Row(
            "Now",
            (
                Panel("Offered", ((rate("tandem_offered_requests_total"), ""),), "reqps", stat=True, width=4),
                Panel(
                    "Goodput",
                    ((rate("tandem_good_requests_total"), ""),),
                    "reqps",
                    stat=True,
                    width=4,
                    about="Offered requests that were served within their SLOs.",
                ),
                Panel("Attainment", attainment("", "", ""), "percentunit", stat=True, width=4),
                Panel("Models with a leader", (("sum(max by (model) (tandem_router_leads))", ""),), stat=True, width=4),
                Panel(
                    "Workers alive",
                    (("sum(max by (model, role) (tandem_router_workers{state='alive'}))", ""),),
                    stat=True,
                    width=4,
                ),
                Panel(
                    "Alerts",
                    (('count(ALERTS{alertname=~"Tandem.*", alertstate="firing"}) or vector(0)', ""),),
                    stat=True,
                    width=4,
                ),
            ),
        ),
        Row(
            "What clients see",
            (
                Panel(
                    "Requests",
                    (
                        *((rate("tandem_offered_requests_total", "", "model"), "{{model}} offered"),),
                        (rate("tandem_good_requests_total", "", "model"), "{{model}} good"),
                    ),
                    "reqps",
                ),
                Panel("Attainment by class", attainment("", "class", "{{class}}"), "percentunit"),
                Panel("Tokens", tokens(""), "short", about="Per second."),
                Panel("Time to first token", quantiles(TTFT), "s"),
                Panel("Time per output token", quantiles(TPOT), "s"),
                Panel("Request duration", quantiles(DURATION), "s"),
                Panel("Missed SLOs", ((rate("tandem_slo_misses_total", "", "slo"), "{{slo}}"),), "reqps"),
                Panel(
                    "Errors told to clients",
                    ((rate("tandem_frontend_errors_total", "", "code"), "{{code}}"),),
                    "reqps",
                    until="a client is told of an error",
                ),
                Panel(
                    "Sent again",
                    ((rate("tandem_frontend_resubmissions_total", "", "model"), "{{model}}"),),
                    "reqps",
                    about="Attempts after a request's first: a worker or a router went away under it.",
                ),
            ),
        ),
        Row(
            "Queue and placement",
            (
                Panel(
                    "Requests in queue",
                    ((total("tandem_router_queue_requests", "", "model, class"), "{{model}} {{class}}"),),
                ),
                Panel(
                    "Prompt tokens in queue",
                    ((total("tandem_router_queue_tokens", "", "model, class"), "{{model}} {{class}}"),),
                ),
                Panel(
                    "Oldest wait",
                    ((highest("tandem_router_queue_oldest_wait_seconds", "", "model, class"), "{{model}} {{class}}"),),
                    "s",
                ),
                Panel(
                    "Placements",
                    ((rate("tandem_router_placements_total", "", "leg, reason"), "{{leg}}: {{reason}}"),),
                    "reqps",
                ),
                Panel("Prefix hit rate", hit_rates(""), "percentunit", about="Share of prompt tokens."),
                Panel(
                    "Refused by routers",
                    ((rate("tandem_router_refusals_total", "", "code"), "{{code}}"),),
                    "reqps",
                    until="a router refuses a request or gives one back",
                ),
            ),
        ),
        Row(
            "Workers",
            (
                Panel(
                    "Workers",
                    ((highest("tandem_router_workers", "", "model, role, state"), "{{model}} {{role}} {{state}}"),),
                ),
                Panel(
                    "Requests in batches",
                    ((total("tandem_worker_running_requests", "", "model, role"), "{{model}} {{role}}"),),
                ),
                Panel(
                    "KV in use",
                    (
                        (
                            f"{total('tandem_worker_kv_blocks_used', '', 'model, role')} / "
                            f"{total('tandem_worker_kv_blocks_capacity', '', 'model, role')}",
                            "{{model}} {{role}}",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "KV transfer", ((rate("tandem_worker_kv_transfer_bytes_total", "", "model"), "{{model}}"),), "Bps"
                ),
                Panel("Time of a KV transfer", quantiles("tandem_worker_kv_transfer_seconds"), "s"),
                Panel(
                    "KV handoffs that failed",
                    ((rate("tandem_worker_kv_transfer_failures_total", "", "reason"), "{{reason}}"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "Processes",
            (
                Panel("Answers to scrapes", (('sum by (instance) (up{job="tandem"})', "{{instance}}"),)),
                Panel(
                    "CPU",
                    ((rate("process_cpu_seconds_total", 'job="tandem"', "instance"), "{{instance}}"),),
                    "short",
                    about="Cores.",
                ),
                Panel(
                    "Memory",
                    (('sum by (instance) (process_resident_memory_bytes{job="tandem"})', "{{instance}}"),),
                    "bytes",
                ),
                Panel("Leaders", ((highest("tandem_router_leads", "", "model, instance"), "{{model}} {{instance}}"),)),
                Panel(
                    "Index",
                    (
                        (f"1 - {highest('tandem_router_index_away', '', 'model')}", "{{model}} answers"),
                        ("min by (model) (tandem_worker_index_complete)", "{{model}} complete"),
                    ),
                ),
                Panel(
                    "Bus",
                    (
                        ("sum by (instance) (tandem_bus_connected)", "{{instance}} connected"),
                        (rate("tandem_bus_malformed_messages_total", "", "instance"), "{{instance}} malformed/s"),
                    ),
                ),
                Panel(
                    "Spans",
                    (
                        (rate("tandem_trace_spans_total"), "made"),
                        (rate("tandem_trace_spans_delivered_total"), "delivered"),
                    ),
                    "ops",
                    about="Of traces. What is made and not delivered is lost.",
                ),
            ),
        ),
        Row(
            "Traces",
            (
                Requests(
                    "Slowest requests of the last minute",
                    '{ resource.service.name = "tandem-frontend" && span.gen_ai.operation.name != nil }',
                    (
                        "gen_ai.response.time_to_first_chunk",
                        "tandem.class",
                        "tandem.tenant",
                        "gen_ai.usage.input_tokens",
                        "gen_ai.usage.cache_read.input_tokens",
                        "gen_ai.usage.output_tokens",
                        "tandem.tpot_ms",
                        "tandem.attempts",
                        "error.type",
                    ),
                    about="Of those that are traced. A click on a trace id opens its waterfall.",
                    last="1m",
                ),
            ),
        ),
    ),
)

# -- one model ---------------------------------------------------------------------------------------------------------

_M = 'model=~"$model"'
_G = 'gen_ai_request_model=~"$model"'
_V = 'model_name=~"$model"'

MODEL = Dashboard(
    uid="tandem-model",
    title="Tandem: one model",
    about="From the queue to the last token of one model's requests, and the workers that run them.",
    variables=(("model", "label_values(tandem_router_leads, model)"),),
    rows=(
        Row(
            "Now",
            (
                Panel("Goodput", ((rate("tandem_good_requests_total", _M), ""),), "reqps", stat=True, width=4),
                Panel("Attainment", attainment(_M, "", ""), "percentunit", stat=True, width=4),
                Panel(
                    "Attainment by tokens",
                    ((share("tandem_good_tokens_total", "tandem_offered_tokens_total", _M), ""),),
                    "percentunit",
                    stat=True,
                    width=4,
                    about="Refusing long prompts does not look good here.",
                ),
                Panel("Open requests", ((total("tandem_frontend_open_requests", _M), ""),), stat=True, width=4),
                Panel("In queue", ((total("tandem_router_queue_requests", _M), ""),), stat=True, width=4),
                Panel(
                    "Leader",
                    ((highest("tandem_router_leads", _M), ""),),
                    stat=True,
                    width=4,
                    about="1: a router leads it.",
                ),
            ),
        ),
        Row(
            "Requests",
            (
                Panel(
                    "Time to first token by class",
                    (
                        (quantile(0.5, TTFT, _G, "class"), "{{class}} p50"),
                        (quantile(0.99, TTFT, _G, "class"), "{{class}} p99"),
                    ),
                    "s",
                ),
                Panel(
                    "Time per output token by class",
                    (
                        (quantile(0.5, TPOT, _G, "class"), "{{class}} p50"),
                        (quantile(0.99, TPOT, _G, "class"), "{{class}} p99"),
                    ),
                    "s",
                ),
                Panel("Request duration", quantiles(DURATION, _G), "s"),
                Panel("Tokens", tokens(_G), about="Per second."),
                Panel("Prompt length", quantiles(USAGE, f'{_G}, gen_ai_token_type="input"'), about="Tokens."),
                Panel("Answer length", quantiles(USAGE, f'{_G}, gen_ai_token_type="output"'), about="Tokens."),
            ),
        ),
        Row(
            "Queue and placement",
            (
                Panel("Wait for placement", quantiles("tandem_router_queue_wait_seconds", _M), "s"),
                Panel(
                    "Queue",
                    (
                        (total("tandem_router_queue_requests", _M, "class"), "{{class}} requests"),
                        (total("tandem_router_queue_tokens", _M, "class"), "{{class}} tokens"),
                    ),
                ),
                Panel(
                    "Oldest wait",
                    ((highest("tandem_router_queue_oldest_wait_seconds", _M, "class"), "{{class}}"),),
                    "s",
                ),
                Panel(
                    "Placements",
                    ((rate("tandem_router_placements_total", _M, "leg, reason"), "{{leg}}: {{reason}}"),),
                    "reqps",
                ),
                Panel("Prefix hit rate", hit_rates(_M), "percentunit", about="Share of prompt tokens."),
                Panel(
                    "Error of predicted steps",
                    ((highest("tandem_router_prediction_error_ratio", _M, "role"), "{{role}}"),),
                    "percentunit",
                ),
                Panel(
                    "Prefill placed and not done",
                    ((highest("tandem_router_pending_prefill_seconds", _M, "role"), "{{role}}"),),
                    "s",
                    about="Predicted, all workers together.",
                ),
                Panel(
                    "KV booked",
                    (
                        (
                            f"{highest('tandem_router_kv_blocks_booked', _M, 'role')} / "
                            f"{highest('tandem_router_kv_blocks_capacity', _M, 'role')}",
                            "{{role}}",
                        ),
                    ),
                    "percentunit",
                ),
                Panel("Epoch", ((highest("tandem_router_epoch", _M), "epoch"),), about="Grows with each election."),
            ),
        ),
        Row(
            "Workers",
            (
                Panel(
                    "Waiting for a first token",
                    ((total("tandem_worker_queue_requests", _M, "role, class"), "{{role}} {{class}}"),),
                ),
                Panel(
                    "Oldest of them",
                    ((highest("tandem_worker_queue_oldest_wait_seconds", _M, "role, class"), "{{role}} {{class}}"),),
                    "s",
                ),
                Panel(
                    "Prompt tokens to compute",
                    ((total("tandem_worker_pending_prefill_tokens", _M, "instance"), "{{instance}}"),),
                ),
                Panel(
                    "Batch",
                    (
                        (total("vllm:num_requests_running", _V, "instance"), "{{instance}} running"),
                        (total("vllm:num_requests_waiting", _V, "instance"), "{{instance}} waiting"),
                    ),
                    about="As vLLM says it.",
                ),
                Panel(
                    "KV in use",
                    ((highest("vllm:kv_cache_usage_perc", _V, "instance"), "{{instance}}"),),
                    "percentunit",
                    about="As vLLM says it.",
                ),
                Panel(
                    "Tokens of the engines",
                    (
                        (rate("vllm:prompt_tokens_total", _V, "instance"), "{{instance}} prompt"),
                        (rate("vllm:generation_tokens_total", _V, "instance"), "{{instance}} generated"),
                    ),
                    about="Per second, as vLLM says it.",
                ),
                Panel(
                    "Requests ended",
                    ((rate("tandem_worker_requests_total", _M, "role, outcome"), "{{role}} {{outcome}}"),),
                    "reqps",
                ),
                Panel("Steps", ((rate("tandem_worker_engine_steps_total", _M, "instance"), "{{instance}}"),), "ops"),
                Panel("Preemptions", ((rate("vllm:num_preemptions_total", _V, "instance"), "{{instance}}"),), "ops"),
            ),
        ),
        Row(
            "KV transfer and index",
            (
                Panel(
                    "KV transfer",
                    ((rate("tandem_worker_kv_transfer_bytes_total", _M, "instance"), "{{instance}}"),),
                    "Bps",
                ),
                Panel("Time of a KV transfer", quantiles("tandem_worker_kv_transfer_seconds", _M), "s"),
                Panel(
                    "Handoffs that failed",
                    ((rate("tandem_worker_kv_transfer_failures_total", _M, "reason"), "{{reason}}"),),
                    "ops",
                ),
                Panel("Handoffs open", ((total("tandem_worker_open_handoffs", _M, "instance"), "{{instance}}"),)),
                Panel(
                    "Index complete", ((f"min by (instance) (tandem_worker_index_complete{{{_M}}})", "{{instance}}"),)
                ),
                Panel(
                    "Announced again",
                    ((rate("tandem_worker_index_announcements_total", _M, "instance"), "{{instance}}"),),
                    "ops",
                ),
            ),
        ),
    ),
)

# -- one tenant --------------------------------------------------------------------------------------------------------

_T = 'tenant=~"$tenant"'

TENANT = Dashboard(
    uid="tandem-tenant",
    title="Tandem: one tenant",
    about="What one tenant asks for, and what it gets.",
    variables=(("tenant", "label_values(tandem_offered_requests_total, tenant)"),),
    rows=(
        Row(
            "Now",
            (
                Panel("Offered", ((rate("tandem_offered_requests_total", _T), ""),), "reqps", stat=True, width=6),
                Panel("Goodput", ((rate("tandem_good_requests_total", _T), ""),), "reqps", stat=True, width=6),
                Panel("Attainment", attainment(_T, "", ""), "percentunit", stat=True, width=6),
                Panel(
                    "Share of all tokens",
                    ((f"{rate('tandem_offered_tokens_total', _T)} / {rate('tandem_offered_tokens_total')}", ""),),
                    "percentunit",
                    stat=True,
                    width=6,
                ),
            ),
        ),
        Row(
            "What it gets",
            (
                Panel("Attainment by class", attainment(_T, "model, class", "{{model}} {{class}}"), "percentunit"),
                Panel(
                    "Attainment by class, by tokens",
                    (
                        (
                            share("tandem_good_tokens_total", "tandem_offered_tokens_total", _T, "model, class"),
                            "{{model}} {{class}}",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Missed SLOs", ((rate("tandem_slo_misses_total", _T, "class, slo"), "{{class}} {{slo}}"),), "reqps"
                ),
                Panel(
                    "Time to first token by class",
                    (
                        (quantile(0.5, TTFT, _T, "class"), "{{class}} p50"),
                        (quantile(0.99, TTFT, _T, "class"), "{{class}} p99"),
                        ('max by (class) (tandem_slo_target_seconds{slo="ttft"})', "{{class}} SLO"),
                    ),
                    "s",
                ),
                Panel(
                    "Time per output token by class",
                    (
                        (quantile(0.5, TPOT, _T, "class"), "{{class}} p50"),
                        (quantile(0.99, TPOT, _T, "class"), "{{class}} p99"),
                        ('max by (class) (tandem_slo_target_seconds{slo="tpot"})', "{{class}} SLO"),
                    ),
                    "s",
                ),
                Panel("Request duration", quantiles(DURATION, _T), "s"),
            ),
        ),
        Row(
            "What it asks for",
            (
                Panel(
                    "Requests by class",
                    ((rate("tandem_offered_requests_total", _T, "model, class"), "{{model}} {{class}}"),),
                    "reqps",
                ),
                Panel("Tokens", tokens(_T), about="Per second."),
                Panel("Prompt length", quantiles(USAGE, f'{_T}, gen_ai_token_type="input"'), about="Tokens."),
                Panel(
                    "In queue",
                    (
                        (total("tandem_router_tenant_queue_requests", _T, "model"), "{{model}} requests"),
                        (total("tandem_router_tenant_queue_tokens", _T, "model"), "{{model}} tokens"),
                    ),
                    until="requests of this tenant wait in a router",
                ),
                Panel(
                    "Requests that failed",
                    ((rate(f"{DURATION}_count", f'{_T}, error_type!=""', "error_type"), "{{error_type}}"),),
                    "reqps",
                    until="a request of this tenant fails",
                ),
            ),
        ),
    ),
)

DASHBOARDS = {"overview": OVERVIEW, "model": MODEL, "tenant": TENANT}


def main() -> int:
    stale = []
    for name, dashboard in DASHBOARDS.items():
        file, text = FOLDER / f"{name}.json", as_json(dashboard)
        if file.exists() and file.read_text() == text:
            continue
        stale.append(file.name)
        if "--check" not in sys.argv[1:]:
            FOLDER.mkdir(exist_ok=True)
            file.write_text(text)
    if "--check" in sys.argv[1:] and stale:
        print(f"not up to date (run `make docs`): {', '.join(stale)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
