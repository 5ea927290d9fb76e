"""Every metric of ours, once: name, kind, labels, buckets, what it says, who has it.

Instruments are made from these rows (``instruments``), docs/metrics.md is written from them, and a test compares them
with what live services give out. Units are in the names. A label's values come from the deployment file or from a list
here; what is not among them becomes ``other``, so that no client can make series.

The GenAI metrics are OpenTelemetry's (semantic conventions for generative AI), names and buckets as its Prometheus
exporters write them. Names with ``vllm:`` are vLLM's own: real engines give out all that vLLM has, simulated ones the
rows here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tandem import errors
from tandem.core.reasons import Reason
from tandem.core.types import FinishReason, Leg, Role

#: What a label value becomes that is none of its known ones.
OTHER = "other"


class Kind(Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Label:
    """``values`` empty: those of the deployment file, which the process knows."""

    name: str
    meaning: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One row. ``services``: the processes that have it. Counters' names end in ``_total``."""

    name: str
    kind: Kind
    services: tuple[str, ...]
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)


# -- labels ------------------------------------------------------------------------------------------------------------

MODEL = Label("model", "name of the model in the deployment file")
TENANT = Label("tenant", "name of the tenant in the deployment file; `default` where there are none")
CLASS = Label("class", "request class of the deployment file")
ROLE = Label("role", "what the worker does at the moment", tuple(role.value for role in Role))
CODE = Label("code", "code of the error (docs/errors.md)", tuple(sorted(errors.all_errors())))
LEG = Label("leg", "`prefill`: on a prefill worker, with a KV handoff; `local`: on the decode worker",
            tuple(leg.value for leg in Leg))  # fmt: skip
REASON = Label("reason", "why this plan and no other (`tandem.core.reasons`)", tuple(reason.value for reason in Reason))
STATE = Label("state", "as the router sees the worker", ("alive", "suspect", "draining"))
SLO = Label("slo", "which promise: `ttft`, `tpot`, or `answer` (it failed or was refused)", ("ttft", "tpot", "answer"))
OUTCOME = Label("outcome", "how it ended on this worker", ("finished", "handed_over", "aborted", "failed"))
FAILURE = Label("reason", "`claim`: not granted or not answered; `pull`: the KV did not come; `tainted`: it was read "
                "after its lease; `undeliverable`: nobody took the handoff",
                ("claim", "pull", "tainted", "undeliverable"))  # fmt: skip
SERVICE = Label("service", "which service", ("frontend", "router", "prefill", "decode", "console"))
VERSION = Label("version", "of Tandem; one value in each process")

EMBEDDINGS = "embeddings"
OPERATION = Label("gen_ai_operation_name", "of the request", ("chat", "text_completion", EMBEDDINGS))
PROVIDER = Label("gen_ai_provider_name", "always `tandem`", ("tandem",))
REQUEST_MODEL = Label("gen_ai_request_model", MODEL.meaning)
TOKEN_TYPE = Label("gen_ai_token_type", "prompt or answer", ("input", "output"))
ERROR_TYPE = Label("error_type", "code of the error; absent where there was none", ("", *CODE.values))

MODEL_NAME = Label("model_name", MODEL.meaning)
ENGINE = Label("engine", "number of the engine in its process", ("0",))
FINISHED = Label("finished_reason", "vLLM's word", tuple(reason.value for reason in FinishReason))

#: Labels whose values are the deployment file's, by the domain that holds them.
DOMAINS = {"model": "model", "gen_ai_request_model": "model", "model_name": "model",
           "tenant": "tenant", "class": "class"}  # fmt: skip

# -- buckets -----------------------------------------------------------------------------------------------------------

#: The GenAI conventions' own.
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(float(4**n) for n in range(14))
_WAIT = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
#: Of what should take far less than a millisecond.
_QUICK = (0.00005, 0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.00075, 0.001, 0.0015, 0.0025, 0.005, 0.01, 0.025, 0.1)
_TRANSFER = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

FRONTEND = ("frontend",)
ROUTER = ("router",)
WORKERS = ("prefill", "decode")
ALL = SERVICE.values

#: Those that make spans.
TRACED = ("frontend", "router", "prefill", "decode")

_GEN_AI = (OPERATION, PROVIDER, REQUEST_MODEL, TENANT, CLASS)
_SCOPE = (MODEL, TENANT, CLASS)
_PLACE = (MODEL, ROLE)


def _counter(name: str, services: tuple[str, ...], help: str, *labels: Label) -> Metric:
    return Metric(name, Kind.COUNTER, services, help, labels)


def _gauge(name: str, services: tuple[str, ...], help: str, *labels: Label) -> Metric:
    return Metric(name, Kind.GAUGE, services, help, labels)


def _histogram(name: str, services: tuple[str, ...], help: str, buckets: tuple[float, ...], *labels: Label) -> Metric:
    return Metric(name, Kind.HISTOGRAM, services, help, labels, buckets)


# -- frontend: what clients see ----------------------------------------------------------------------------------------

TIME_TO_FIRST_TOKEN = _histogram(
    "gen_ai_server_time_to_first_token_seconds",
    FRONTEND,
    "From the request's arrival to its first token.",
    _FIRST_TOKEN,
    *_GEN_AI,
)
TIME_PER_OUTPUT_TOKEN = _histogram(
    "gen_ai_server_time_per_output_token_seconds",
    FRONTEND,
    "Mean time per token after the first (TPOT), of answers of two tokens and more.",
    _PER_TOKEN,
    *_GEN_AI,
)
REQUEST_DURATION = _histogram(
    "gen_ai_server_request_duration_seconds",
    FRONTEND,
    "From the request's arrival to its end, however it ended.",
    _DURATION,
    *_GEN_AI,
    ERROR_TYPE,
)
TOKEN_USAGE = _histogram(
    "gen_ai_client_token_usage",
    FRONTEND,
    "Tokens of a request: of its prompts, and of its answers.",
    _TOKENS,
    *_GEN_AI,
    TOKEN_TYPE,
)
OFFERED_REQUESTS = _counter(
    "tandem_offered_requests_total",
    FRONTEND,
    "Requests that ended, whether served, refused or failed; not those that their client cancelled in good time.",
    *_SCOPE,
)
GOOD_REQUESTS = _counter(
    "tandem_good_requests_total",
    FRONTEND,
    "Offered requests that were served within their SLOs (goodput). One without SLOs is good when it is served.",
    *_SCOPE,
)
OFFERED_TOKENS = _counter(
    "tandem_offered_tokens_total", FRONTEND, "Prompt and answer tokens of offered requests.", *_SCOPE
)
GOOD_TOKENS = _counter(
    "tandem_good_tokens_total",
    FRONTEND,
    "Prompt and answer tokens of good requests: refusing the long ones does not look good here.",
    *_SCOPE,
)
SLO_MISSES = _counter(
    "tandem_slo_misses_total", FRONTEND, "Offered requests that were not good, by the first promise broken.",
    *_SCOPE, SLO,
)  # fmt: skip
SLO_TARGET = _gauge("tandem_slo_target_seconds", FRONTEND, "SLO of a request class, where it has one.", CLASS, SLO)
FRONTEND_ERRORS = _counter("tandem_frontend_errors_total", FRONTEND, "Errors that clients were told of.", CODE)
RESUBMISSIONS = _counter(
    "tandem_frontend_resubmissions_total",
    FRONTEND,
    "Attempts after a request's first: its worker or its router went away, or asked for it.",
    MODEL,
)
REQUESTS_OPEN = _gauge("tandem_frontend_open_requests", FRONTEND, "Requests that have not ended.", MODEL)
LEADER_KNOWN = _gauge(
    "tandem_frontend_leader_known", FRONTEND, "1: this frontend hears a router that leads the model; 0: it does not.",
    MODEL,
)  # fmt: skip
TOKENIZER_FELL_BACK = _gauge(
    "tandem_frontend_tokenizer_fell_back",
    FRONTEND,
    "1: the fast tokeniser is not the same as Hugging Face's for this model, which therefore tokenises; 0: it is, "
    "or was not asked for.",
    MODEL,
)

# -- router ------------------------------------------------------------------------------------------------------------

LEADS = _gauge("tandem_router_leads", ROUTER, "1: this router leads the model; 0: it stands by.", MODEL)
EPOCH = _gauge("tandem_router_epoch", ROUTER, "Highest epoch of a leader that this router has heard of.", MODEL)
QUEUE_REQUESTS = _gauge(
    "tandem_router_queue_requests", ROUTER, "Requests that wait to be placed. Of a leader; 0 elsewhere.", MODEL, CLASS
)
QUEUE_TOKENS = _gauge("tandem_router_queue_tokens", ROUTER, "Prompt tokens that wait to be placed.", MODEL, CLASS)
QUEUE_OLDEST = _gauge(
    "tandem_router_queue_oldest_wait_seconds", ROUTER, "Age of the request that has waited longest; 0: none waits.",
    MODEL, CLASS,
)  # fmt: skip
TENANT_QUEUE_REQUESTS = _gauge(
    "tandem_router_tenant_queue_requests", ROUTER, "Requests that wait to be placed, by tenant.", MODEL, TENANT
)
TENANT_QUEUE_TOKENS = _gauge(
    "tandem_router_tenant_queue_tokens", ROUTER, "Prompt tokens that wait to be placed, by tenant.", MODEL, TENANT
)
QUEUE_WAIT = _histogram(
    "tandem_router_queue_wait_seconds", ROUTER, "From a request's arrival to its placement.", _WAIT, MODEL, CLASS
)
INDEX_LOOKUP = _histogram(
    "tandem_router_index_lookup_seconds",
    ROUTER,
    "From asking the prefix index to its answer. What arrives together is asked together.",
    _QUICK,
    MODEL,
)
DECISION = _histogram(
    "tandem_router_decision_seconds",
    ROUTER,
    "Time of a look at the queue that placed or refused something.",
    _QUICK,
    MODEL,
)
PLACEMENTS = _counter("tandem_router_placements_total", ROUTER, "Requests placed.", MODEL, LEG, REASON)
PLACED_TOKENS = _counter("tandem_router_placed_prompt_tokens_total", ROUTER, "Prompt tokens of placed requests.", MODEL)
PREDICTED_CACHED = _counter(
    "tandem_router_predicted_cached_tokens_total",
    ROUTER,
    "Of these, those that the prefix index says are cached where the prompt is computed: the predicted hit rate.",
    MODEL,
)
REFUSALS = _counter(
    "tandem_router_refusals_total", ROUTER, "Requests refused or given back to their frontends.", MODEL, CODE
)
IN_FLIGHT = _gauge("tandem_router_in_flight_requests", ROUTER, "Requests placed and not ended.", MODEL)
WORKERS_SEEN = _gauge("tandem_router_workers", ROUTER, "Workers of the model.", MODEL, ROLE, STATE)
WORKERS_LOST = _counter("tandem_router_workers_lost_total", ROUTER, "Workers declared dead.", MODEL)
PENDING_PREFILL = _gauge(
    "tandem_router_pending_prefill_seconds", ROUTER, "Predicted prefill work placed and not done, all workers.", *_PLACE
)
KV_BOOKED = _gauge("tandem_router_kv_blocks_booked", ROUTER, "KV blocks reserved on all workers.", *_PLACE)
KV_CAPACITY = _gauge("tandem_router_kv_blocks_capacity", ROUTER, "KV blocks of all workers.", *_PLACE)
PREDICTION_ERROR = _gauge(
    "tandem_router_prediction_error_ratio", ROUTER, "Mean relative error of predicted step times, mean over workers.",
    *_PLACE,
)  # fmt: skip
INDEX_AWAY = _gauge(
    "tandem_router_index_away", ROUTER, "1: the prefix index does not answer, and load alone decides.", MODEL
)

# -- workers -----------------------------------------------------------------------------------------------------------

WORKER_QUEUE_REQUESTS = _gauge(
    "tandem_worker_queue_requests", WORKERS, "Requests taken whose first token is not out.", *_PLACE, CLASS
)
WORKER_QUEUE_TOKENS = _gauge(
    "tandem_worker_queue_tokens", WORKERS, "Prompt tokens of requests taken whose first token is not out.",
    *_PLACE, CLASS,
)  # fmt: skip
WORKER_QUEUE_OLDEST = _gauge(
    "tandem_worker_queue_oldest_wait_seconds", WORKERS, "Age of the oldest of them on this worker; 0: there is none.",
    *_PLACE, CLASS,
)  # fmt: skip
WORKER_RUNNING = _gauge("tandem_worker_running_requests", WORKERS, "Requests in the engine's batch.", *_PLACE)
WORKER_WAITING = _gauge("tandem_worker_waiting_requests", WORKERS, "Requests in the engine's queue.", *_PLACE)
WORKER_PENDING = _gauge(
    "tandem_worker_pending_prefill_tokens", WORKERS, "Prompt tokens accepted and not computed.", *_PLACE
)
WORKER_KV_USED = _gauge("tandem_worker_kv_blocks_used", WORKERS, "KV blocks in use.", *_PLACE)
WORKER_KV_CAPACITY = _gauge("tandem_worker_kv_blocks_capacity", WORKERS, "KV blocks there are.", *_PLACE)
WORKER_STEPS = _counter("tandem_worker_engine_steps_total", WORKERS, "Steps of the engine that did work.", *_PLACE)
WORKER_STEP_AGE = _gauge(
    "tandem_worker_last_step_age_seconds", WORKERS, "Time since the engine's last step; 0 when it has nothing to do.",
    *_PLACE,
)  # fmt: skip
WORKER_HANDOFFS = _gauge("tandem_worker_open_handoffs", WORKERS, "Prompts whose KV waits to be pulled.", *_PLACE)
WORKER_DRAINING = _gauge("tandem_worker_draining", WORKERS, "1: it takes nothing new.", *_PLACE)
WORKER_EPOCH = _gauge("tandem_worker_epoch", WORKERS, "Highest epoch of a leader that this worker has heard of.", MODEL)
WORKER_REQUESTS = _counter("tandem_worker_requests_total", WORKERS, "Requests ended.", *_PLACE, OUTCOME)
WORKER_ERRORS = _counter("tandem_worker_errors_total", WORKERS, "Requests failed or refused.", *_PLACE, CODE)
PREFIX_PROMPT = _counter(
    "tandem_worker_prompt_tokens_total", WORKERS, "Prompt tokens of requests whose prompt was computed here.", *_PLACE
)
PREFIX_PREDICTED = _counter(
    "tandem_worker_predicted_cached_tokens_total", WORKERS, "Of these, those that the router believed to be cached.",
    *_PLACE,
)  # fmt: skip
PREFIX_CACHED = _counter(
    "tandem_worker_cached_tokens_total", WORKERS, "Of these, those that the engine had cached: the actual hit rate.",
    *_PLACE,
)  # fmt: skip
KV_BYTES = _counter("tandem_worker_kv_transfer_bytes_total", WORKERS, "KV bytes pulled from other workers.", *_PLACE)
KV_SECONDS = _histogram(
    "tandem_worker_kv_transfer_seconds", WORKERS, "Time of a KV transfer, as the worker that pulls sees it.",
    _TRANSFER, *_PLACE,
)  # fmt: skip
KV_FAILURES = _counter(
    "tandem_worker_kv_transfer_failures_total", WORKERS, "KV handoffs that came to nothing.", *_PLACE, FAILURE
)
INDEX_COMPLETE = _gauge(
    "tandem_worker_index_complete", WORKERS, "0: KV events were lost, and what is cached is not all published.", *_PLACE
)
INDEX_GAPS = _counter("tandem_worker_index_gaps_total", WORKERS, "Losses of KV events.", *_PLACE)
INDEX_AGAIN = _counter(
    "tandem_worker_index_announcements_total",
    WORKERS,
    "Announcements of everything: the index lost it, or said more than was here.",
    *_PLACE,
)
FRAMES_DROPPED = _counter(
    "tandem_worker_frames_dropped_total", WORKERS, "Messages that the bus could not take; their content is repaired.",
    MODEL,
)  # fmt: skip

# -- every process -----------------------------------------------------------------------------------------------------

BUILD = _gauge("tandem_build_info", ALL, "Always 1.", SERVICE, VERSION)
BUS_CONNECTED = _gauge("tandem_bus_connected", ALL, "1: the connection to NATS is up.")
BUS_RECONNECTS = _counter("tandem_bus_reconnects_total", ALL, "Connections to NATS after the first.")
BUS_MALFORMED = _counter("tandem_bus_malformed_messages_total", ALL, "Messages that are not what their subject is for.")
BUS_HANDLER_ERRORS = _counter("tandem_bus_handler_errors_total", ALL, "Messages whose handling failed: defects.")
BUS_REFUSED = _counter("tandem_bus_refused_publishes_total", ALL, "Messages refused because too much waits for NATS.")
BUS_ERRORS = _counter("tandem_bus_server_errors_total", ALL, "What NATS complained of.")
SPANS = _counter("tandem_trace_spans_total", TRACED, "Spans to be sent, once for each collector.")
SPANS_DELIVERED = _counter(
    "tandem_trace_spans_delivered_total", TRACED, "Of these, those that a collector has taken; the others are lost."
)

# -- from libraries, under their own names -----------------------------------------------------------------------------

PROCESS = (
    _gauge("process_virtual_memory_bytes", ALL, "Virtual memory."),
    _gauge("process_resident_memory_bytes", ALL, "Resident memory."),
    _gauge("process_start_time_seconds", ALL, "Start, in seconds since 1970."),
    _counter("process_cpu_seconds_total", ALL, "CPU time, user and system."),
    _gauge("process_open_fds", ALL, "Open file descriptors."),
    _gauge("process_max_fds", ALL, "Most file descriptors that it may open."),
)

_VLLM = (MODEL_NAME, ENGINE)
VLLM_RUNNING = _gauge("vllm:num_requests_running", WORKERS, "Requests in the batch.", *_VLLM)
VLLM_WAITING = _gauge("vllm:num_requests_waiting", WORKERS, "Requests that wait.", *_VLLM)
VLLM_KV_USAGE = _gauge("vllm:kv_cache_usage_perc", WORKERS, "KV cache in use; 1 is all of it.", *_VLLM)
VLLM_QUERIES = _counter("vllm:prefix_cache_queries_total", WORKERS, "Tokens looked up in the prefix cache.", *_VLLM)
VLLM_HITS = _counter("vllm:prefix_cache_hits_total", WORKERS, "Tokens found in the prefix cache.", *_VLLM)
VLLM_PREEMPTIONS = _counter("vllm:num_preemptions_total", WORKERS, "Preemptions.", *_VLLM)
VLLM_PROMPT = _counter("vllm:prompt_tokens_total", WORKERS, "Prompt tokens processed.", *_VLLM)
VLLM_GENERATION = _counter("vllm:generation_tokens_total", WORKERS, "Tokens generated.", *_VLLM)
VLLM_SUCCESS = _counter("vllm:request_success_total", WORKERS, "Requests ended.", *_VLLM, FINISHED)

#: What a simulated engine gives out under vLLM's names.
VLLM = (
    VLLM_RUNNING,
    VLLM_WAITING,
    VLLM_KV_USAGE,
    VLLM_QUERIES,
    VLLM_HITS,
    VLLM_PREEMPTIONS,
    VLLM_PROMPT,
    VLLM_GENERATION,
    VLLM_SUCCESS,
)

#: All of them, in the order of this file.
TABLE: tuple[Metric, ...] = (
    *(value for name, value in list(globals().items()) if isinstance(value, Metric) and not name.startswith("VLLM")),
    *PROCESS,
    *VLLM,
)


def of_service(service: str) -> dict[str, Metric]:
    """By name."""
    return {metric.name: metric for metric in TABLE if service in metric.services}
