"""A cluster for this folder: two routers, two simulated workers, tenants and classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.site import Site
from tests.harness.tenants import deployment


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder: Path = tmp_path_factory.mktemp("scheduling")
    wanted = {**deployment(routers=2), "record": {"folder": str(folder / "recorded")}}
    made = Site(wanted, folder)
    made.start(90.0)
    try:
        yield made
    finally:
        made.resume_all()
        made.stop()
