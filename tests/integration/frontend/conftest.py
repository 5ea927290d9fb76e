"""A whole frontend on free ports, over a real nats-server, before a cluster that computes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from services.frontend.app import Frontend
from services.frontend.config import FrontendSettings
from services.frontend.tokenizer import Tokenizer
from tandem.adapters.deployment import Class, Deployment, Endpoint, Limits, Model, Pool, PoolRole, Tenant
from tandem.adapters.embedded import EmbeddedServer
from tandem.adapters.nats_bus import NatsBus
from tests.integration.frontend.fake_cluster import FakeCluster
from tests.unit.frontend.conftest import byte_level_folder  # noqa: F401 - a fixture

MODEL = "org/model-1.0"
KEY = "sk-test"


class Site:
    """What a test works with."""

    def __init__(self, frontend: Frontend, cluster: FakeCluster, tokenizer: Tokenizer) -> None:
        self.frontend = frontend
        self.cluster = cluster
        self.tokenizer = tokenizer
        self.url = f"http://127.0.0.1:{frontend.http_port}"
        self.client = openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=KEY, max_retries=0, timeout=30.0)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def answer(self, text: str) -> None:
        """Every request is answered with ``text`` and an end token."""
        ids = [*self.ids(text), 2]
        self.cluster.script = lambda submit: ids

    async def until(self, condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.01)


StartSite = Callable[..., contextlib.AbstractAsyncContextManager[Site]]


@pytest.fixture
def start_site(nats_server: EmbeddedServer, byte_level_folder: Path, cluster: str) -> StartSite:  # noqa: F811
    @contextlib.asynccontextmanager
    async def start(
        *,
        tenants: bool = False,
        limits: Limits | None = None,
        nats_url: str = "",
        model: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> AsyncIterator[Site]:
        deployment = Deployment(
            cluster=cluster,
            http=Endpoint(port=0),
            grpc=Endpoint(port=0),
            models=(
                Model(
                    name=MODEL,
                    path=str(byte_level_folder),
                    max_model_len=512,
                    pools=(Pool(role=PoolRole.AGGREGATED, engine="sim"),),
                    **(model or {}),
                ),
            ),
            classes=(Class(name="interactive"), Class(name="batch", timeout_s=50.0)),
            tenants=(
                (
                    Tenant(
                        name="t1",
                        api_key_sha256=(hashlib.sha256(KEY.encode()).hexdigest(),),
                        allowed_classes=("batch",),
                        request_class="batch",
                    ),
                )
                if tenants
                else ()
            ),
            limits=limits or Limits(),
        )
        frontend_bus = await NatsBus.connect(nats_url or nats_server.url)
        other_bus = await NatsBus.connect(nats_url or nats_server.url)
        frontend = Frontend(FrontendSettings(**{"deployment": "", **settings}), deployment, frontend_bus)
        tokenizer = Tokenizer(byte_level_folder)
        fake = FakeCluster(other_bus, cluster, MODEL, lambda submit: [2])
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(frontend_bus.close)
            stack.push_async_callback(other_bus.close)
            stack.push_async_callback(frontend.close)
            await stack.enter_async_context(fake.serving())
            await frontend.start()
            serving = asyncio.create_task(frontend.run())
            site = Site(frontend, fake, tokenizer)
            stack.push_async_callback(site.client.close)
            await site.until(lambda: frontend.readiness()["ready"])
            try:
                yield site
            finally:
                await site.client.close()
                await frontend.stop()
                await frontend.hang_up()
                await serving

    return start


@pytest.fixture
async def site(start_site: StartSite) -> AsyncIterator[Site]:
    async with start_site() as started:
        yield started
