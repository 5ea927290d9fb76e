"""A cluster on the simulated engine that has served two tenants, and been asked for things that it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.harness.cluster import Cluster
from tests.integration.observability.load import deployment, load


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(deployment(), tmp_path_factory.mktemp("observed")).start(120) as made:
        asyncio.run(load(made, rounds=3))
        yield made
