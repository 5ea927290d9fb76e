from __future__ import annotations

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes

from tandem.core.placement import TERMS
from tandem.core.queueing import Wait
from tandem.telemetry import spans


def test_the_table_is_whole() -> None:
    used = {name for span in spans.SPANS for name in (*span.always, *span.attributes)}
    used |= {name for span in spans.SPANS for event in span.events for name in event.attributes}
    assert used == set(spans.ATTRIBUTES), "an attribute without a span, or a span with an undeclared one"
    for span in spans.SPANS:
        assert len(span.allowed) == len(span.always) + len(span.attributes), span.name
    names = [span.name for span in spans.SPANS]
    assert len(set(names)) == len(names)


def test_every_term_of_a_cost_and_every_reason_to_wait_is_told() -> None:
    assert tuple(spans.CANDIDATE_TERMS) == TERMS
    assert set(spans.QUEUE_REASONS) == {"none", *(wait.value for wait in Wait)}


def test_names_of_the_conventions_are_theirs() -> None:
    theirs = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    theirs.add(error_attributes.ERROR_TYPE)
    for name in spans.ATTRIBUTES:
        assert name in theirs or name.startswith("tandem."), name
