"""A profile is found again from the steps that it makes, though some of them took much longer than they should."""

from __future__ import annotations

import random

import pytest

from tandem.core.profiles import PROFILES, Profile
from tandem.core.types import StepTiming
from tandem.enginemodel.fit import LEAST_STEPS, fit
from tandem.enginemodel.profile import context_sum, step_s

CPU = PROFILES["cpu-smollm2"]


def steps(profile: Profile, rng: random.Random, noise: float, stolen: float) -> list[StepTiming]:
    found = []
    shapes = [
        (n, context_sum(before, n), b, 500 * b) for n in (32, 64, 256) for before in (0, 512, 2048) for b in (0, 4)
    ]
    shapes += [(0, 0, b, b * context) for b in (1, 2, 4, 8, 16) for context in (64, 512, 2048)]
    for tokens, context, sequences, kv in shapes * 4:
        seconds = step_s(profile, tokens, context, sequences, kv) * rng.lognormvariate(0.0, noise)
        if rng.random() < stolen:
            seconds *= rng.uniform(2.0, 6.0)
        found.append(StepTiming(seconds, tokens, context, sequences, kv))
    return found


@pytest.mark.parametrize("name", ["cpu-smollm2", "sim-h100-llama-70b-tp4"])
def test_the_terms_are_found_again(name: str) -> None:
    profile = PROFILES[name]
    found = fit("x", steps(profile, random.Random(1), 0.0, 0.0), "test")
    for term in ("p0", "p1", "p2", "p3", "d0", "d1", "d2"):
        assert getattr(found, term) == pytest.approx(getattr(profile, term), rel=0.02), term


@pytest.mark.parametrize("seed", range(4))
def test_stolen_time_hardly_moves_the_predictions(seed: int) -> None:
    rng = random.Random(seed)
    found = fit("x", steps(CPU, rng, 0.05, 0.15), "test")
    for shape in ((256, context_sum(1024, 256), 0, 0), (64, context_sum(0, 64), 4, 2000), (0, 0, 8, 4096)):
        assert step_s(found, *shape) == pytest.approx(step_s(CPU, *shape), rel=0.1)
    assert min(found.p0, found.p1, found.p2, found.p3, found.d0, found.d1, found.d2) >= 0.0


def test_too_few_steps_are_refused() -> None:
    few = [s for s in steps(CPU, random.Random(0), 0.0, 0.0) if s.prefill_tokens][: LEAST_STEPS + 5]
    with pytest.raises(ValueError, match="too few"):
        fit("x", few, "test")
