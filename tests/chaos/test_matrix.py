"""Every fault of every process under load, on the simulated engine: what `make faults` runs, on less load."""

from __future__ import annotations

import pytest

from tests.chaos.conftest import Ground
from tests.faults.cases import CASES, Case
from tests.faults.matrix import SCALES, entered
from tests.faults.verdict import ERROR_WITHIN_S, problems, row
from tests.harness.answers import SimAnswers

pytestmark = pytest.mark.timeout(240)
#: What must come within some seconds may take longer on a machine that does other things too.
BUSY = 3.0


async def check(ground: Ground, case: Case) -> None:
    async with entered(ground.site, ground.store, SimAnswers(), SCALES["small"]) as arena:
        mark = len(ground.site.log())
        record = await arena.run(case)
        found = problems(record, error_within_s=BUSY * ERROR_WITHIN_S)
        print(row(record, found))
        if found:
            print(ground.site.log()[mark:][-20_000:])
        assert not found


@pytest.mark.parametrize("case", [c for c in CASES if c.target.routers == 1], ids=lambda case: case.name)
async def test_with_one_router(one_router: Ground, case: Case) -> None:
    await check(one_router, case)


@pytest.mark.parametrize("case", [c for c in CASES if c.target.routers == 2], ids=lambda case: case.name)
async def test_with_a_standby(two_routers: Ground, case: Case) -> None:
    await check(two_routers, case)
