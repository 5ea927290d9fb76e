"""One cluster for a module; each test leaves it as it found it: ``Site.settled`` sees to that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.site import Site, deployment

START_S = 90.0


def _running(folder: Path, wanted: dict[str, Any]) -> Iterator[Site]:
    site = Site(wanted, folder)
    site.start(START_S)
    try:
        yield site
    finally:
        site.resume_all()
        site.stop()


@pytest.fixture(scope="module")
def cluster_of_one_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from _running(tmp_path_factory.mktemp("cluster"), deployment())


@pytest.fixture(scope="module")
def cluster_of_two_routers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from _running(tmp_path_factory.mktemp("routers"), deployment(routers=2))
