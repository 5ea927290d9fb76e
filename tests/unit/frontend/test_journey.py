"""The life of a request under every kind of loss: no token missing, repeated or wrong, and always an end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.frontend.journey import MAX_INCIDENTS, State
from services.frontend.order import Patience
from tandem.core.types import FinishReason, SamplingParams
from tandem.errors import Cancelled, NoLeader, QueueTimeout, RequestTimeout, TandemError
from tandem.telemetry import spans
from tests.unit.frontend.unreliable_cluster import END_TOKEN, Recorder, UnreliableCluster, reference

PROMPT = [3, 1, 4, 1, 5]
GENEROUS = Patience(max_failures=1000, leader_grace_s=30.0, recovery_grace_s=30.0)


def plain(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


def run(cluster: UnreliableCluster, *recorders: Recorder, at_most_s: float = 700.0) -> None:
    cluster.run(until=lambda: all(r.outcome for r in recorders), at_most_s=at_most_s)
    assert all(r.outcome for r in recorders), "a request hangs"


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), trouble=st.sampled_from([0.0, 0.1, 0.4]), max_tokens=st.integers(1, 60))
def test_every_token_once_whatever_is_lost(seed: int, trouble: float, max_tokens: int) -> None:
    cluster = UnreliableCluster(seed, trouble=trouble, patience=GENEROUS)
    prompts = [PROMPT, [2, 7, 1, 8], [seed % 991]]
    recorders = [cluster.begin(prompt, plain(max_tokens)) for prompt in prompts]
    run(cluster, *recorders)
    for prompt, recorder in zip(prompts, recorders, strict=True):
        outcome = recorder.outcome
        assert outcome is not None and outcome.error is None
        wanted = reference(prompt, max_tokens)
        assert recorder.seen == wanted
        assert outcome.output_tokens == len(wanted)
        assert outcome.reason is (FinishReason.STOP if wanted[-1] == END_TOKEN else FinishReason.LENGTH)
    assert len(cluster.table) == 0


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), restartable=st.booleans())
def test_what_cannot_go_on_starts_again_unseen_or_ends_with_an_error(seed: int, restartable: bool) -> None:
    """With a seed, prompt + tokens is another request."""
    cluster = UnreliableCluster(seed, trouble=0.3, patience=GENEROUS)
    sampling = SamplingParams(max_tokens=40, seed=1)
    recorder = cluster.begin(PROMPT, sampling, restartable=restartable)
    run(cluster, recorder)
    outcome, wanted = recorder.outcome, reference(PROMPT, 40)
    assert outcome is not None
    if outcome.error is None:
        assert recorder.seen == wanted
    else:
        assert not restartable and outcome.error.retryable
        assert recorder.seen and recorder.seen == wanted[: len(recorder.seen)]
        assert recorder.restarts == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_with_the_usual_patience_it_ends_and_never_with_wrong_tokens(seed: int) -> None:
    cluster = UnreliableCluster(seed, trouble=0.4, peace_s=1e9)
    recorder = cluster.begin(PROMPT, plain(50))
    run(cluster, recorder)
    outcome, wanted = recorder.outcome, reference(PROMPT, 50)
    assert outcome is not None
    assert recorder.seen == wanted[: len(recorder.seen)]
    assert (outcome.error is None and recorder.seen == wanted) or isinstance(outcome.error, TandemError)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), after=st.floats(0.0, 2.0))
def test_cancel_ends_at_once_and_leaves_nothing(seed: int, after: float) -> None:
    cluster = UnreliableCluster(seed, trouble=0.2)
    recorder = cluster.begin(PROMPT, SamplingParams(max_tokens=1000, ignore_eos=True))
    cluster.run(until=lambda: False, at_most_s=after)
    for journey in cluster.table:
        journey.cancel()
    cluster.run(until=lambda: recorder.outcome is not None, at_most_s=1.0)
    assert recorder.outcome is not None
    assert len(cluster.table) == 0
    cluster.run(until=lambda: False, at_most_s=40.0)  # nothing is said after the end: the recorder asserts it
    if cluster.trouble == 0:
        assert not any(w.running for w in cluster.workers)


def test_stopped_early_it_still_learns_what_was_cached() -> None:
    cluster = UnreliableCluster(0, trouble=0.0)
    recorder = cluster.begin(PROMPT, plain(1000))
    cluster.run(until=lambda: len(recorder.seen) > 4, at_most_s=5.0)
    (journey,) = cluster.table
    journey.stop(cluster.now)
    assert journey.state is State.STOPPING
    seen = len(recorder.seen)
    run(cluster, recorder, at_most_s=1.0)
    outcome = recorder.outcome
    assert outcome is not None and outcome.error is None
    assert (outcome.reason, outcome.cached_tokens, len(recorder.seen)) == (FinishReason.STOP, 3, seen)


def test_what_goes_by_a_line_is_counted_and_the_rest_takes_the_long_way() -> None:
    """All the tests above have such lines, too."""
    cluster = UnreliableCluster(0, trouble=0.0)
    recorder = cluster.begin(PROMPT, plain(60))
    run(cluster, recorder)
    assert recorder.outcome is not None and recorder.seen == reference(PROMPT, 60)
    assert 0 < recorder.line.taken < len(recorder.seen)
    assert recorder.outcome.output_tokens == len(recorder.seen)


def test_a_question_closes_the_line_so_that_silence_is_seen() -> None:
    cluster = UnreliableCluster(0, trouble=0.0)
    recorder = cluster.begin(PROMPT, SamplingParams(max_tokens=5000, ignore_eos=True))
    cluster.run(until=lambda: recorder.line.taken > 0, at_most_s=5.0)
    (journey,) = cluster.table
    journey.open_line(recorder.line)
    assert journey.line is not None
    journey.on_tick(cluster.now + 2.0)
    assert journey.line is None


def test_no_line_while_log_probabilities_are_wanted() -> None:
    cluster = UnreliableCluster(0, trouble=0.0)
    cluster.begin(PROMPT, SamplingParams(max_tokens=60, logprobs=1))
    cluster.run(until=lambda: False, at_most_s=1.0)
    for journey in cluster.table:
        journey.open_line(next(iter(cluster.recorders.values())).line)
        assert journey.line is None


def test_no_leader_is_borne_for_the_grace() -> None:
    cluster = UnreliableCluster(0, trouble=0.0)
    cluster.router_alive = False
    recorder = cluster.begin(PROMPT, plain(5))
    began = cluster.now
    run(cluster, recorder)
    assert recorder.outcome is not None and isinstance(recorder.outcome.error, NoLeader)
    assert cluster.now - began == pytest.approx(Patience().leader_grace_s, abs=0.5)


def test_a_new_leader_gets_what_the_old_one_had_queued() -> None:
    cluster = UnreliableCluster(0, trouble=0.0)
    cluster.run(until=lambda: False, at_most_s=1.0)
    cluster._assigned = lambda worker, submit: None  # type: ignore[method-assign]  # it stays in the queue
    recorder = cluster.begin(PROMPT, plain(5))
    cluster.run(until=lambda: False, at_most_s=3.0)
    del cluster._assigned  # type: ignore[method-assign]
    cluster._elect()
    run(cluster, recorder, at_most_s=2.0)
    assert recorder.seen == reference(PROMPT, 5)


@pytest.mark.parametrize(("placed", "error"), [(True, RequestTimeout), (False, QueueTimeout)])
def test_deadlines_have_their_own_errors(placed: bool, error: type[TandemError]) -> None:
    cluster = UnreliableCluster(0, trouble=0.0)
    cluster.run(until=lambda: False, at_most_s=1.0)
    if placed:
        cluster._step = lambda worker, key: None  # type: ignore[method-assign]
    else:
        cluster._assigned = lambda worker, submit: None  # type: ignore[method-assign]
    recorder = cluster.begin(PROMPT, plain(5))
    run(cluster, recorder, at_most_s=601.0)
    assert recorder.outcome is not None and isinstance(recorder.outcome.error, error)


def test_a_prefill_that_takes_long_is_not_a_loss() -> None:
    """The holder answers questions although it has no token yet."""
    cluster = UnreliableCluster(0, trouble=0.0)
    cluster.run(until=lambda: False, at_most_s=1.0)
    step = cluster._step
    cluster._step = lambda worker, key: cluster.later(60.0, lambda: step(worker, key))  # type: ignore[method-assign]
    recorder = cluster.begin(PROMPT, plain(1))
    (journey,) = cluster.table
    run(cluster, recorder, at_most_s=100.0)
    assert recorder.seen == reference(PROMPT, 1)
    assert journey.attempt == 0


def test_cancelled_is_what_the_consumer_hears() -> None:
    cluster = UnreliableCluster(0, trouble=0.0)
    recorder = cluster.begin(PROMPT, plain(5))
    for journey in cluster.table:
        journey.cancel()
        journey.cancel()
    run(cluster, recorder, at_most_s=1.0)
    assert recorder.outcome is not None and isinstance(recorder.outcome.error, Cancelled)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), trouble=st.sampled_from([0.0, 0.1, 0.3]))
def test_every_further_attempt_is_noted_with_what_befell_the_one_before(seed: int, trouble: float) -> None:
    cluster = UnreliableCluster(seed, trouble=trouble, patience=GENEROUS)
    recorder = cluster.begin(PROMPT, plain(20))
    (journey,) = cluster.table
    run(cluster, recorder)
    noted = [i.kind for i in journey.incidents if i.kind is not spans.GAP]
    again = [kind for kind in noted if kind in (spans.RETRY, spans.MIGRATION)]
    if len(journey.incidents) < MAX_INCIDENTS:
        assert len(again) == journey.attempt
        assert noted.count(spans.FAILURE) >= len(again)
    times = [incident.at_s for incident in journey.incidents]
    assert times == sorted(times) and journey.outcome is recorder.outcome
