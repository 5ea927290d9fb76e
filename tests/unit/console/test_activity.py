"""Load reports and lifecycle events become rows, spans and requests; nothing grows without bound."""

from __future__ import annotations

from services.console.activity import GONE_MS, SILENT, SILENT_MS, Activity
from services.console.frontend_counts import Counts, counts_of
from services.console.series import Series
from services.console.summary import Slo, Summary
from tandem.spacetime.model import DECODE, MIXED, PREFILL, TRANSFER
from tandem.v1 import bus_pb2, types_pb2

Phase = bus_pb2.Phase


def worker(name: str, incarnation: int = 1) -> types_pb2.WorkerRef:
    return types_pb2.WorkerRef(id=name, incarnation=incarnation)


def report(
    name: str, *steps: tuple[float, int, int], running: int = 1, incarnation: int = 1, role: int = 2
) -> bus_pb2.LoadReport:
    """``steps``: (seconds, prefill tokens, decoding sequences)."""
    return bus_pb2.LoadReport(
        worker=worker(name, incarnation),
        model="m",
        role=types_pb2.Role.ValueType(role),
        running_requests=running,
        kv_blocks_used=10,
        kv_blocks_total=40,
        step_timings=[bus_pb2.StepTiming(duration_s=s, prefill_tokens=p, decode_sequences=d) for s, p, d in steps],
    )


def events(name: str, *what: tuple[str, Phase], incarnation: int = 1) -> bus_pb2.LifecycleEvents:
    return bus_pb2.LifecycleEvents(
        worker=worker(name, incarnation),
        events=[bus_pb2.LifecycleEvent(key=types_pb2.RequestKey(id=i), phase=phase) for i, phase in what],
    )


def spans(activity: Activity) -> list[list[float]]:
    flat = activity.snapshot().spans
    return [flat[i : i + 5] for i in range(0, len(flat), 5)]


def test_steps_of_a_report_end_when_it_arrives_and_never_overlap() -> None:
    activity = Activity(60_000)
    activity.load(report("d", (0.02, 0, 4), (0.02, 0, 6), (0.03, 500, 6)), 1000.0)
    activity.load(report("d", (0.09, 0, 4), (0.09, 0, 4)), 1100.0)  # more than there is room for
    found = spans(activity)
    assert [(kind, begin, end) for _, kind, begin, end, _ in found] == [
        (DECODE, 930.0, 970.0), (MIXED, 970.0, 1000.0), (DECODE, 1000.0, 1100.0),
    ]  # fmt: skip
    assert found[0][4] == 5.0  # sequences, on average


def test_a_request_prefilled_elsewhere_arrives_by_kv_transfer() -> None:
    activity = Activity(60_000)
    activity.load(report("p", role=1), 900.0)
    activity.load(report("d"), 900.0)
    activity.events(events("p", ("r", bus_pb2.PHASE_ACCEPTED)), 1000.0)
    activity.events(events("p", ("r", bus_pb2.PHASE_PREFILL_DONE)), 1050.0)
    activity.events(events("d", ("r", bus_pb2.PHASE_ACCEPTED)), 1052.0)
    assert [segment.kind for segment in activity.in_flight] == [TRANSFER]
    activity.events(events("d", ("r", bus_pb2.PHASE_DECODING)), 1080.0)
    activity.events(events("d", ("r", bus_pb2.PHASE_FINISHED)), 1500.0)
    assert not activity.in_flight
    assert [span[1:4] for span in spans(activity)] == [[TRANSFER, 1052.0, 1080.0]]
    whole = activity.snapshot()
    assert [(opened[0], opened[2]) for opened in whole.opened] == [(0, PREFILL), (1, TRANSFER), (1, DECODE)]
    assert len(whole.closed) == 3


def test_requests_on_one_worker_have_lanes_of_their_own_and_give_them_back() -> None:
    activity = Activity(60_000)
    activity.load(report("d"), 900.0)
    for i in range(3):
        activity.events(events("d", (f"r{i}", bus_pb2.PHASE_ACCEPTED)), 1000.0 + i)
    assert sorted(segment.lane for segment in activity.in_flight) == [0, 1, 2]
    activity.events(events("d", ("r1", bus_pb2.PHASE_DECODING)), 1010.0)
    assert {s.request: s.lane for s in activity.in_flight}["r1"] == 1
    activity.events(events("d", ("r1", bus_pb2.PHASE_FAILED), ("r9", bus_pb2.PHASE_ACCEPTED)), 1020.0)
    assert {s.request: s.lane for s in activity.in_flight}["r9"] == 1


def test_ends_that_nobody_told_of_are_noticed() -> None:
    activity = Activity(60_000)
    activity.load(report("d"), 900.0)
    activity.events(events("d", ("r", bus_pb2.PHASE_ACCEPTED)), 1000.0)
    for at in range(1000, 6000, 100):
        activity.load(report("d", running=0), float(at))
    assert not activity.in_flight


def test_a_restarted_worker_has_its_row_and_none_of_its_requests() -> None:
    activity = Activity(60_000)
    activity.load(report("d"), 900.0)
    activity.events(events("d", ("r", bus_pb2.PHASE_ACCEPTED)), 1000.0)
    activity.load(report("d", incarnation=2), 1100.0)
    activity.events(events("d", ("late", bus_pb2.PHASE_ACCEPTED)), 1200.0)  # of the former process
    assert not activity.in_flight and len(activity.rows) == 1


def test_silence_is_shown_and_long_silence_ends_the_row() -> None:
    activity = Activity(60_000)
    activity.load(report("d"), 1000.0)
    activity.drain()
    activity.tick(1000.0 + SILENT_MS + 1)
    assert [load[1] for load in activity.drain().loads.values()] == [SILENT]
    activity.tick(1000.0 + GONE_MS + 1)
    assert not activity.rows


def test_what_is_kept_is_bounded_however_long_it_runs() -> None:
    activity = Activity(2_000)
    for n in range(3000):
        at = 1000.0 + 100 * n
        activity.load(report("d", (0.02, 0, 4), (0.01, 100, 0)), at)
        activity.events(events("d", (f"r{n}", bus_pb2.PHASE_ACCEPTED), (f"r{n}", bus_pb2.PHASE_FINISHED)), at)
        activity.drain()
    row = activity.rows["d"]
    assert len(row.spans) <= 2 * 21 and len(row.segments) <= 21 and row.lanes == 1


def summary(**values: object) -> Summary:
    return Summary("t", request_id="r", why="sampled", ended=True, **values)  # type: ignore[arg-type]


def test_figures_over_time() -> None:
    series = Series(counted=False)
    for n in range(10):
        done = summary(ttft_s=0.1 * n, input_tokens=100, cached_tokens=40, output_tokens=5)
        series.request_ended(done, 100.0 + n)
    series.request_ended(summary(error="overloaded"), 109.5)
    series.request_ended(summary(ttft_s=9.0, slo_met=False), 109.6)
    recent = series.recent(110.0)
    assert recent["attainment"] == 10 / 12 and recent["failed_per_s"] == 1 / 60
    assert recent["ttft_p50_s"] == 0.5 and recent["ttft_p99_s"] == 9.0
    assert recent["hit_rate"] == 0.4
    columns = series.points(110.0, 60, 5)["columns"]
    assert len(columns["t"]) == 12 and columns["t"] == sorted(columns["t"])
    assert sum(rate * 5 for rate in columns["requests_per_s"] if rate) == 12


def test_with_counters_traces_add_no_requests_and_kept_slow_ones_no_percentile() -> None:
    series = Series(counted=True)
    series.count(Counts(offered=30, good=27, failed=1), 100.0, 1.0)
    series.request_ended(summary(ttft_s=0.1), 100.2)
    series.request_ended(Summary("t", request_id="r", why="slow", ttft_s=9.0, ended=True), 100.3)
    recent = series.recent(101.0)
    assert recent["requests_per_s"] == 0.5 and recent["attainment"] == 0.9 and recent["ttft_p99_s"] == 0.1


def test_counters_of_a_restarted_frontend_start_anew() -> None:
    text = (
        'tandem_offered_requests_total{model="m",tenant="a"} 5\ntandem_offered_requests_total{model="m",tenant="b"} 2\n'
        'tandem_good_requests_total{model="m"} 6\n'
        'gen_ai_client_token_usage_sum{gen_ai_token_type="input"} 700\n'
        'gen_ai_client_token_usage_sum{gen_ai_token_type="output"} 70\n'
    )
    counts = counts_of(text)
    assert counts == Counts(7, 6, 0, 700, 70)
    assert counts.since(Counts(4, 4, 0, 400, 40)) == Counts(3, 2, 0, 300, 30)
    assert counts.since(Counts(400, 4, 0, 400, 40)) == counts


def test_an_slo_without_a_first_token_is_missed() -> None:
    assert Slo(ttft_s=0.5).met(None, None) is False
    assert Slo(ttft_s=0.5).met(0.4, 99.0) is True
    assert Slo(tpot_s=0.05).met(None, 0.06) is False
    assert Slo().met(9.0, 9.0) is None


def test_ends_that_were_missed_are_noticed_on_a_worker_that_stays_busy() -> None:
    activity = Activity(60_000)
    activity.load(report("d"), 0.0)
    for i in range(5):
        activity.events(events("d", (f"r{i}", bus_pb2.PHASE_DECODING)), 10.0 + i)
    for at in range(100, 3000, 100):
        activity.load(report("d", running=2), float(at))
    assert [segment.request for segment in activity.in_flight] == ["r3", "r4"]
