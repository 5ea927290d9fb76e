"""A client that leaves stops its request wherever it is, over any protocol, and nothing is left: `make cancel`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.faults.cancel import PROTOCOLS, STAGES, cancelled_in, slow_deployment
from tests.harness.site import Site

pytestmark = pytest.mark.timeout(120)
#: A second is the aim; this allows for a busy machine.
GONE_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(slow_deployment(), tmp_path_factory.mktemp("slow")).start(90.0) as made:
        assert isinstance(made, Site)
        yield made


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("stage", STAGES)
async def test_cancelled_in(site: Site, stage: str, protocol: str) -> None:
    cell = await cancelled_in(site, stage, protocol, GONE_WITHIN_S)
    print(f"{stage}, {protocol}: nothing left after {cell.took_s:.2f} s")
    assert cell.good, cell.left
    await asyncio.to_thread(site.settled)
