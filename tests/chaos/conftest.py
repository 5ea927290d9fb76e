"""One cluster for a module, and a Redis of its own; each case leaves it as it found it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.cases import Store
from tests.harness.site import Site, deployment

START_S = {"sim": 90.0, "vllm": 600.0}


@dataclass(frozen=True)
class Ground:
    site: Site
    store: Store


@contextmanager
def running(folder: Path, engine: str, routers: int, decode: int = 2) -> Iterator[Ground]:
    store = Store(folder / "redis")
    asyncio.run(store.start())
    wanted = deployment(engine=engine, routers=routers, decode=decode, step_s=0.03)
    site = Site(wanted, folder, env={"TANDEM_REDIS_URL": store.url})
    try:
        site.start(START_S[engine])
        yield Ground(site, store)
    finally:
        site.resume_all()
        site.stop()
        asyncio.run(store.close())


@pytest.fixture(scope="module")
def one_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with running(tmp_path_factory.mktemp("one"), "sim", 1) as ground:
        yield ground


@pytest.fixture(scope="module")
def two_routers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with running(tmp_path_factory.mktemp("two"), "sim", 2) as ground:
        yield ground
