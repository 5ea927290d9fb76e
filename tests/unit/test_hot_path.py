"""The hot path stays as cheap as it is: CPU per request as a ratio to a fixed piece of work in the same process.

Both are CPU time, taken in turns, each the least of several: other work on the machine and its speed cancel out. The
bounds are about twice what `python -m bench.hot_path` printed when they were set (docs/performance.md): a second
tokenisation, a task or a dataclass per token, or a lost coalescing break them; noise does not.
"""

from __future__ import annotations

import gc

import pytest

from bench.hot_path import MODEL, FrontendPath, frontend_figures
from services.frontend.generation import Generation, GenerationRequest
from services.frontend.journey import Journey
from services.frontend.openai_responses import Answer
from tandem.models.prepare import resolve_model

#: In yardsticks per request.
BOUNDS = {
    "128/32 burst": 0.07,
    "128/32 paced": 0.1,
    "1024/128 burst": 0.14,
    "1024/128 paced": 0.24,
}


@pytest.mark.timeout(300)
async def test_cpu_per_request_keeps_its_ratio_to_the_yardstick() -> None:
    figures = await frontend_figures(320)
    unit = figures.pop("yardstick")
    ratios = {name: value / unit for name, value in figures.items()}
    too_much = {name: round(ratio, 3) for name, ratio in ratios.items() if ratio > BOUNDS[name]}
    assert not too_much, f"all of them: {ratios}"


async def test_a_request_that_is_over_is_not_left_to_the_garbage_collector() -> None:
    path = FrontendPath(resolve_model(MODEL, weights=False, progress=lambda line: None))
    await path.open()
    try:
        gc.collect()
        gc.disable()
        await path.run(isl=128, osl=32, batch=8, burst=8)
        kinds = (Generation, GenerationRequest, Journey, Answer)
        left = [type(found).__name__ for found in gc.get_objects() if isinstance(found, kinds)]
    finally:
        gc.enable()
        await path.close()
    assert left == []
