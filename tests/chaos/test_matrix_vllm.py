"""A part of the fault matrix on real vLLM, whose answers are those of the same cluster before it was harmed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.conftest import Ground, running
from tests.faults.cases import Case, Fault, Target
from tests.faults.matrix import SCALES, entered
from tests.faults.recorded import recorded_answers
from tests.faults.verdict import ERROR_WITHIN_S, problems, row
from tests.harness.answers import RecordedAnswers

pytestmark = pytest.mark.timeout(900)
SCALE = SCALES["small vllm"]
BUSY = 3.0
CASES = [Case(Target.DECODE, Fault.KILL), Case(Target.PREFILL, Fault.KILL), Case(Target.NATS, Fault.KILL)]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with running(tmp_path_factory.mktemp("vllm"), "vllm", 1) as made:
        yield made


@pytest.fixture(scope="module")
def answers(ground: Ground) -> RecordedAnswers:
    return recorded_answers(ground.site, SCALE.tokens, SCALE.isl)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_on_vllm(ground: Ground, answers: RecordedAnswers, case: Case) -> None:
    async with entered(ground.site, ground.store, answers, SCALE) as arena:
        mark = len(ground.site.log())
        record = await arena.run(case)
        found = problems(record, error_within_s=BUSY * ERROR_WITHIN_S)
        print(row(record, found))
        if found:
            print(ground.site.log()[mark:][-20_000:])
        assert not found
