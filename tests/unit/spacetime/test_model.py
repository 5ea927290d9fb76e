"""From steps to spans."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.spacetime.model import DECODE, KINDS, MIXED, PREFILL, Step, asset, spans_of_steps

STEPS = st.lists(st.builds(Step, st.floats(0, 50), st.integers(0, 2000), st.integers(0, 64)), min_size=0, max_size=30)


def test_runs_of_a_kind_are_one_span_and_keep_their_order() -> None:
    steps = [Step(10, 0, 4), Step(10, 0, 8), Step(20, 300, 0), Step(5, 10, 2)]
    found = spans_of_steps(steps, 100.0, 0.0, 8)
    assert [(s.kind, s.begin, s.end, s.level) for s in found] == [
        (DECODE, 55.0, 75.0, 6.0), (PREFILL, 75.0, 95.0, 0.0), (MIXED, 95.0, 100.0, 2.0),
    ]  # fmt: skip


@given(STEPS, st.floats(0, 500), st.integers(3, 8))
def test_spans_fit_between_what_was_and_now_and_keep_the_shares(steps: list[Step], room: float, most: int) -> None:
    found = spans_of_steps(steps, 1000.0, 1000.0 - room, most)
    assert len(found) <= most
    at = 1000.0 - room - 1e-6
    for span in found:
        assert at <= span.begin + 1e-6 and span.begin <= span.end <= 1000.0 + 1e-6
        at = span.end
    total = sum(step.duration for step in steps)
    if found:
        scale = min(1.0, room / total)
        for kind in range(len(KINDS)):
            took = sum(step.duration for step in steps if step.kind == kind) * scale
            assert abs(sum(s.end - s.begin for s in found if s.kind == kind) - took) < 1e-3


def test_the_drawing_module_stands_alone_and_knows_the_same_kinds() -> None:
    source = asset("map.js")
    assert "import " not in source.replace("imports", "")
    assert f"KINDS = {list(KINDS)}".replace("'", '"') in source
    for kind in KINDS:
        assert f"--{kind}:" in asset("map.css")
