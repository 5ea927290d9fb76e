from __future__ import annotations

import random

import pytest

from tandem.telemetry.propagation import TraceContext, parse, sampled, trace_of
from tandem.telemetry.sampling import Budget, Sampler, SamplingPolicy
from tandem.telemetry.tracing import OFF, SpanRecord, Tracing
from tests.harness.kept_spans import KeptSpans

HEADER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_traceparent_there_and_back() -> None:
    context = parse(HEADER)
    assert context == TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)
    assert context is not None and context.header == HEADER
    assert parse(context._replace(sampled=False).header) == context._replace(sampled=False)
    assert trace_of(HEADER) == "0af7651916cd43dd8448eb211c80319c" and trace_of("") == "-"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        HEADER.upper(),
        HEADER + "0",
        HEADER + "-what-else",  # version 0 ends there
        "ff" + HEADER[2:],
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        HEADER.replace("-", "_"),
    ],
)
def test_what_is_no_context_is_ignored(header: str) -> None:
    assert parse(header) is None


def test_later_versions_and_other_flags_are_understood() -> None:
    later = parse("cc" + HEADER[2:] + "-what-else")
    assert later is not None and later.sampled
    flags = parse(HEADER[:-2] + "08")
    assert flags is not None and not flags.sampled


def test_only_what_is_sampled_is_looked_at() -> None:
    assert sampled(HEADER) == parse(HEADER)
    assert sampled(HEADER[:-2] + "00") is None and sampled("") is None


def test_a_share_of_the_traces_is_sampled() -> None:
    sampler, rng = Sampler(SamplingPolicy(ratio=0.2)), random.Random(1)
    ids = [rng.getrandbits(128) for _ in range(5000)]
    taken = [sampler.samples(one, None, 0.0) for one in ids]
    assert 0.17 < sum(taken) / len(taken) < 0.23
    assert [sampler.samples(one, None, 9.0) for one in ids] == taken, "by the trace id alone"
    assert not Sampler(SamplingPolicy(ratio=0.0)).samples(0, None, 0.0)
    assert Sampler(SamplingPolicy(ratio=1.0)).samples((1 << 128) - 1, None, 0.0)


def test_a_clients_decision_stands_unless_we_were_told_otherwise() -> None:
    always, never = Sampler(SamplingPolicy(ratio=1.0)), Sampler(SamplingPolicy(ratio=0.0))
    assert never.samples(7, True, 0.0) and not always.samples(7, False, 0.0)
    assert Sampler(SamplingPolicy(ratio=1.0, parent_based=False)).samples(7, False, 0.0)


def test_a_budget_lets_so_many_through_a_second() -> None:
    budget = Budget(5.0)
    assert [budget.take(100.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert [budget.take(100.3) for _ in range(2)] == [True, False]
    assert sum(budget.take(200.0) for _ in range(50)) == 5, "nothing is saved up"
    rare = Budget(0.5)
    assert [rare.take(at) for at in (0.0, 1.0, 2.0)] == [True, False, True]
    assert not Budget(0.0).take(1.0)
    many = Budget(100.0, at_once=20.0)
    assert sum(many.take(second) for second in map(float, range(10)) for _ in range(100)) == 1000


def test_at_low_load_everything_is_sampled() -> None:
    sampler = Sampler(SamplingPolicy(ratio=0.0, per_s=10.0, at_once=10.0))
    assert all(sampler.samples(number, None, number / 5) for number in range(100))
    assert sum(sampler.samples(number, None, 50.0 + number / 1000) for number in range(2000)) <= 31


def test_what_is_tried_by_hand_is_sampled_all_and_a_steady_load_little() -> None:
    sampler = Sampler(SamplingPolicy(ratio=0.0, per_s=5.0))
    assert sum(sampler.samples(number, None, 1.0) for number in range(40)) == 20
    steady = sum(sampler.samples(number, None, 2.0 + number / 100) for number in range(1000))
    assert 45 <= steady <= 55
    assert sum(sampler.samples(number, None, 60.0) for number in range(40)) == 20


def test_a_trace_begins_or_goes_on() -> None:
    tracing = Tracing(KeptSpans(), Sampler(SamplingPolicy(ratio=1.0)))
    new = tracing.begin("", 0.0)
    assert new.context.sampled and new.context.trace_id and new.context.span_id and new.parent_id == 0
    old = tracing.begin(HEADER, 0.0)
    parent = parse(HEADER)
    assert parent is not None
    assert old.context.trace_id == parent.trace_id and old.parent_id == parent.span_id
    assert old.context.span_id not in (0, parent.span_id)
    assert tracing.begin("rubbish", 0.0).parent_id == 0


def test_every_span_has_an_id() -> None:
    kept = KeptSpans()
    Tracing(kept).emit(5, [SpanRecord("a", 0.0, 1.0, {}), SpanRecord("b", 0.0, 1.0, {}, span_id=9)])
    assert [(trace, record.span_id != 0) for trace, record in kept.records] == [(5, True), (5, True)]
    assert kept.records[1][1].span_id == 9
    OFF.emit(5, [SpanRecord("a", 0.0, 1.0, {})])
    assert not OFF.enabled
