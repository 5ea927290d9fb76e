"""What the frontend counts: each request once, at its end, from what its Generation knows then.

A request costs one look-up (the cells of its model, operation, tenant and class) and a handful of additions; a token
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from services.frontend.generation import Generation
from tandem.adapters.deployment import Class, Deployment
from tandem.errors import Cancelled, InvalidRequest, TandemError
from tandem.telemetry import metric_table as table
from tandem.telemetry.instruments import Counter, Histogram, Instruments, Reading

_PROVIDER = table.PROVIDER.values[0]


@dataclass(slots=True)
class _Cells:
    """Of one (operation, model, tenant, class)."""

    first_token: Histogram
    per_token: Histogram
    duration: dict[str, Histogram]  # by error code
    input_tokens: Histogram
    output_tokens: Histogram
    offered: Counter
    good: Counter
    offered_tokens: Counter
    good_tokens: Counter
    misses: dict[str, Counter]
    resubmissions: Counter
    ttft_slo_s: float
    tpot_slo_s: float


class FrontendMetrics:
    def __init__(self, instruments: Instruments, deployment: Deployment, now: Callable[[], float]) -> None:
        self._instruments = instruments
        self._now = now
        self._classes: Mapping[str, Class] = {c.name: c for c in deployment.classes}
        self._cells: dict[tuple[str, str, str, str], _Cells] = {}
        self._errors: dict[str, Counter] = {}
        self._models = [model.name for model in deployment.models]
        for model in self._models:
            instruments.counter(table.RESUBMISSIONS, model)
        instruments.watch(table.SLO_TARGET, self._targets)

    def watch_tokenizers(self, fell_back: Mapping[str, bool]) -> None:
        """By model; it is so from the start or not at all."""
        self._instruments.watch(
            table.TOKENIZER_FELL_BACK, lambda: [((model,), float(fell)) for model, fell in fell_back.items()]
        )

    def watch(self, open_requests: Callable[[], Mapping[str, int]], has_leader: Callable[[str], bool]) -> None:
        """``open_requests``: by model."""

        def requests() -> Reading:
            found = open_requests()
            return [((model,), found.get(model, 0)) for model in self._models]

        self._instruments.watch(table.REQUESTS_OPEN, requests)
        self._instruments.watch(
            table.LEADER_KNOWN, lambda: [((model,), float(has_leader(model))) for model in self._models]
        )

    def reconfigure(self, deployment: Deployment) -> None:
        """Other classes, other SLOs, for requests that end from now on."""
        self._classes = {c.name: c for c in deployment.classes}
        self._cells.clear()  # what they count into stays

    # -- events ----------------------------------------------------------------------------------------------------

    def told(self, error: TandemError) -> None:
        """A client was told of it."""
        cell = self._errors.get(error.code)
        if cell is None:
            cell = self._errors[error.code] = self._instruments.counter(table.FRONTEND_ERRORS, error.code)
        cell.add()

    def ended(self, generation: Generation) -> None:
        """A request is over, well or not."""
        request = generation.request
        key = (request.operation, request.model.name, request.tenant, request.request_class)
        cells = self._cells.get(key) or self._new_cells(*key)
        now = self._now()
        error, usage = generation.error, generation.usage
        first, last, output_tokens, resubmissions = generation.progress()
        if error is None:
            output_tokens = usage.completion_tokens
        duration_s = now - request.arrival_s
        self._took(cells, key, error, duration_s)
        cells.input_tokens.observe(usage.prompt_tokens)
        cells.output_tokens.observe(output_tokens)
        if resubmissions:
            cells.resubmissions.add(resubmissions)
        ttft_s = first - request.arrival_s if first else None
        tpot_s = 0.0
        if ttft_s is not None:
            cells.first_token.observe(ttft_s)
            gaps = output_tokens / generation.num_choices - 1
            if gaps > 0:
                tpot_s = (last - first) / gaps
                cells.per_token.observe(tpot_s)
        waited_s = duration_s if ttft_s is None else ttft_s
        late = waited_s > (request.ttft_slo_s or cells.ttft_slo_s)
        broken = "ttft" if late else "tpot" if tpot_s > cells.tpot_slo_s else ""
        self._judge(cells, error, broken, usage.prompt_tokens + output_tokens)

    def embedded(
        self, model: str, tenant: str, request_class: str, arrival_s: float, tokens: int, error: TandemError | None
    ) -> None:
        """A request for embeddings is over. All of its answer comes at once: that is its first token."""
        key = (table.EMBEDDINGS, model, tenant, request_class)
        cells = self._cells.get(key) or self._new_cells(*key)
        duration_s = self._now() - arrival_s
        self._took(cells, key, error, duration_s)
        cells.input_tokens.observe(tokens)
        self._judge(cells, error, "ttft" if duration_s > cells.ttft_slo_s else "", tokens)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _took(self, cells: _Cells, key: tuple[str, str, str, str], error: TandemError | None, seconds: float) -> None:
        code = "" if error is None else error.code
        duration = cells.duration.get(code)
        if duration is None:
            duration = cells.duration[code] = self._instruments.histogram(
                table.REQUEST_DURATION, key[0], _PROVIDER, *key[1:], code
            )
        duration.observe(seconds)

    def _judge(self, cells: _Cells, error: TandemError | None, broken: str, tokens: int) -> None:
        """``broken``: the SLO that it did not keep. Neither a client's mistake nor what it cancels before anything is
        broken was offered."""
        if error is not None:
            if isinstance(error, InvalidRequest) or (isinstance(error, Cancelled) and not broken):
                return
            if not isinstance(error, Cancelled):
                broken = "answer"
        cells.offered.value += 1
        cells.offered_tokens.value += tokens
        if broken:
            cells.misses[broken].value += 1
        else:
            cells.good.value += 1
            cells.good_tokens.value += tokens

    def _new_cells(self, operation: str, model: str, tenant: str, request_class: str) -> _Cells:
        make, count = self._instruments.histogram, self._instruments.counter
        gen_ai = (operation, _PROVIDER, model, tenant, request_class)
        scope = (model, tenant, request_class)
        slo = self._classes.get(request_class)
        cells = self._cells[(operation, model, tenant, request_class)] = _Cells(
            first_token=make(table.TIME_TO_FIRST_TOKEN, *gen_ai),
            per_token=make(table.TIME_PER_OUTPUT_TOKEN, *gen_ai),
            duration={},
            input_tokens=make(table.TOKEN_USAGE, *gen_ai, "input"),
            output_tokens=make(table.TOKEN_USAGE, *gen_ai, "output"),
            offered=count(table.OFFERED_REQUESTS, *scope),
            good=count(table.GOOD_REQUESTS, *scope),
            offered_tokens=count(table.OFFERED_TOKENS, *scope),
            good_tokens=count(table.GOOD_TOKENS, *scope),
            misses={name: count(table.SLO_MISSES, *scope, name) for name in table.SLO.values},
            resubmissions=count(table.RESUBMISSIONS, model),
            ttft_slo_s=(slo.ttft_slo_s if slo is not None else None) or float("inf"),
            tpot_slo_s=(slo.tpot_slo_s if slo is not None else None) or float("inf"),
        )
        return cells

    def _targets(self) -> Iterable[tuple[tuple[str, ...], float]]:
        for name, request_class in self._classes.items():
            for slo, seconds in (("ttft", request_class.ttft_slo_s), ("tpot", request_class.tpot_slo_s)):
                if seconds is not None:
                    yield (name, slo), seconds
