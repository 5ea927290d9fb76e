"""The performance model learns what a worker really does, from whatever profile it starts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.perf_model import LEAST, MOST, PerfModel
from tandem.core.profiles import PROFILES, Profile, profile_named
from tandem.core.types import StepTiming

TRUE = PROFILES["sim-h100-llama-70b-tp4"]


def traffic(
    profile: Profile, count: int, seed: int = 0, noise: float = 0.03, outliers: float = 0.0
) -> list[StepTiming]:
    """Steps as an engine with exactly these terms would time them, noisy."""
    rng = random.Random(seed)
    steps = []
    for _ in range(count):
        sequences, kv = rng.randrange(1, 128), 0
        kv = sequences * rng.randrange(200, 6000)
        tokens = rng.choice([0, 0, 0, rng.randrange(16, 4096)])
        context = tokens * rng.randrange(0, 8000)
        if tokens:
            seconds = profile.p0 + profile.p1 * (tokens + sequences) + profile.p2 * context + profile.p3 * kv
        else:
            seconds = profile.d0 + profile.d1 * sequences + profile.d2 * kv
        seconds *= rng.gauss(1.0, noise)
        if rng.random() < outliers:
            seconds *= 20.0
        steps.append(StepTiming(seconds, tokens, context, sequences, kv))
    return steps


def scaled(profile: Profile, factor: float) -> Profile:
    terms = {name: getattr(profile, name) * factor for name in ("p0", "p1", "p2", "p3", "d0", "d1", "d2")}
    return replace(profile, **terms)


def worst_error(model: PerfModel, truth: Profile) -> float:
    """Over sizes that matter."""
    errors = []
    for tokens in (128, 1024, 8000):
        real = PerfModel(truth).prefill_s(tokens, tokens * tokens / 2, 8192, 16, 16 * 2000)
        errors.append(abs(model.prefill_s(tokens, tokens * tokens / 2, 8192, 16, 16 * 2000) / real - 1))
    for batch in (1, 16, 100):
        real = PerfModel(truth).decode_step_s(batch, batch * 2000)
        errors.append(abs(model.decode_step_s(batch, batch * 2000) / real - 1))
    return max(errors)


def test_predictions_are_the_roofline_of_the_profile() -> None:
    model = PerfModel(TRUE)
    expected = 3 * TRUE.p0 + TRUE.p1 * 20000 + TRUE.p2 * 1e8 + 3 * (TRUE.p1 * 7 + TRUE.p3 * 5000)
    assert model.prefill_s(20000, 1e8, 8192, 7, 5000) == pytest.approx(expected)
    assert model.decode_step_s(7, 5000) == pytest.approx(TRUE.d0 + 7 * TRUE.d1 + 5000 * TRUE.d2)
    assert model.prefill_s(0, 0.0, 8192) == 0.0


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.0, 1.3, 2.0, 5.0])
def test_it_finds_a_worker_that_differs_from_its_profile(factor: float) -> None:
    truth = scaled(TRUE, factor)
    model = PerfModel(TRUE)
    model.observe(traffic(truth, 600))
    assert worst_error(model, truth) < 0.1
    assert model.relative_error < 0.1


#: Steps of the shape that Dynamo's mocker gives its own: nearly all of a prompt's step is fixed, and decodes depend on
#: the KV tokens that they read much more than on anything else.
OTHER = Profile(
    "other", 2.2e-2, 1.5e-5, 8.4e-10, 9.7e-7, 5.7e-3, 1e-6, 9.7e-7, source="a test of learning", relative_error=0.05
)


@pytest.mark.parametrize("start", ["sim-h100-llama-8b-tp1", "sim-h100-llama-70b-tp4", "generic"])
def test_it_learns_a_worker_whose_profile_is_of_another_kind(start: str) -> None:
    """Terms are up to forty times what the profile says, others a hundredth. It takes a minute of a busy worker."""
    model = PerfModel(PROFILES[start])
    rng = random.Random(1)
    steps, sequences = [], 5
    for _ in range(1200):
        sequences = max(1, min(16, sequences + rng.choice((-1, 0, 0, 0, 1))))
        kv = sequences * rng.randrange(900, 1700)
        tokens = rng.choice([0] * 5 + [rng.randrange(150, 900)])
        context = tokens * rng.randrange(500, 1500)
        real = PerfModel(OTHER)
        seconds = real.prefill_s(tokens, context, 8192, sequences, kv) or real.decode_step_s(sequences, kv)
        steps.append(StepTiming(seconds * rng.gauss(1.0, 0.03), tokens, context, sequences, kv))
    model.observe(steps)
    real = PerfModel(OTHER)
    for tokens, batch in ((150, 2), (500, 8), (1200, 4)):
        shape = tokens, tokens * 800, 8192, batch, batch * 1300
        assert model.prefill_s(*shape) == pytest.approx(real.prefill_s(*shape), rel=0.15)
    for batch in (1, 4, 12):
        assert model.decode_step_s(batch, batch * 1300) == pytest.approx(
            real.decode_step_s(batch, batch * 1300), rel=0.15
        )
    assert model.relative_error < 0.08


def test_it_follows_a_drift() -> None:
    model = PerfModel(TRUE)
    model.observe(traffic(TRUE, 2000))
    slower = scaled(TRUE, 1.6)
    model.observe(traffic(slower, 800, seed=1))
    assert worst_error(model, slower) < 0.12


def test_stolen_time_moves_it_little() -> None:
    model = PerfModel(TRUE)
    model.observe(traffic(TRUE, 1500, outliers=0.03))
    assert worst_error(model, TRUE) < 0.2


def test_the_stated_error_is_about_the_real_one() -> None:
    model = PerfModel(TRUE)
    assert model.relative_error == TRUE.relative_error
    model.observe(traffic(TRUE, 1000, noise=0.1))
    assert 0.05 < model.relative_error < 0.12  # mean |N(0, 0.1)| is 0.08


def test_a_term_without_traffic_stays_between_the_profile_and_what_the_others_show() -> None:
    model = PerfModel(TRUE)
    model.observe([StepTiming(2 * (TRUE.d0 + TRUE.d1), 0, 0, 1, 0)] * 500)
    assert TRUE.d2 <= model.d2 <= 2 * TRUE.d2
    assert model.p1 == TRUE.p1
    assert model.decode_step_s(1, 0) == pytest.approx(2 * (TRUE.d0 + TRUE.d1), rel=0.05)


def test_a_sibling_starts_from_what_was_learnt() -> None:
    truth = scaled(TRUE, 1.5)
    first = PerfModel(TRUE)
    first.observe(traffic(truth, 600))
    second = PerfModel(TRUE)
    second.adopt(first.state())
    assert worst_error(second, truth) == pytest.approx(worst_error(first, truth))


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            StepTiming,
            st.floats(-1, 1e4, allow_nan=False),
            st.integers(0, 10**6),
            st.integers(0, 10**11),
            st.integers(0, 10**4),
            st.integers(0, 10**8),
        ),
        max_size=60,
    )
)
def test_no_timing_makes_a_term_negative_or_a_prediction_absurd(steps: list[StepTiming]) -> None:
    model = PerfModel(TRUE)
    model.observe(steps)
    for term in ("p0", "p1", "p2", "p3", "d0", "d1", "d2"):
        prior = getattr(TRUE, term)
        assert 0.999 * LEAST * prior <= getattr(model, term) <= 1.001 * MOST * prior
    assert 0 <= model.relative_error <= 1


def test_profiles_name_their_source_and_error() -> None:
    for name, profile in PROFILES.items():
        assert profile.name == name
        assert len(profile.source) > 20
        assert 0 < profile.relative_error <= 0.5
        assert min(profile.p0, profile.p1, profile.p2, profile.p3, profile.d0, profile.d1, profile.d2) > 0
    assert profile_named("from-the-future").name == "generic"


#: NVIDIA AIC tables, ms: 70B on 4 H100. (new, cached) -> prefill; (batch, context) -> decode step.
PREFILL_70B_TP4 = {
    (512, 0): 37.3,
    (1024, 0): 67.4,
    (4096, 0): 264,
    (8192, 0): 577,
    (1024, 4096): 70.8,
    (1024, 16384): 82.3,
}
DECODE_70B_TP4 = {
    (1, 1024): 14.9,
    (32, 1024): 16.9,
    (256, 1024): 30.5,
    (1, 4096): 15.1,
    (64, 4096): 24.1,
    (256, 4096): 51.6,
}


def test_the_h100_profile_stays_near_its_table() -> None:
    model = PerfModel(TRUE)
    for (new, cached), table_ms in PREFILL_70B_TP4.items():
        context = new * cached + new * (new - 1) / 2
        assert 1e3 * model.prefill_s(new, context, 10**6) == pytest.approx(table_ms, rel=0.15)
    for (batch, context_tokens), table_ms in DECODE_70B_TP4.items():
        assert 1e3 * model.decode_step_s(batch, batch * context_tokens) == pytest.approx(table_ms, rel=0.15)
