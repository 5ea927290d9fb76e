"""The router process: one ModelRouter for each model of the deployment, and the gRPC service about them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
from collections.abc import Iterator
from pathlib import Path

from services.router.config import RouterSettings
from services.router.metrics import RouterMetrics
from services.router.model_router import ModelRouter, Ports
from services.router.recording import RecordingScheduler, recording_for
from services.router.service import RouterControl
from services.router.tracing import RouterTraces
from tandem.adapters import clock, timing
from tandem.adapters.addresses import own_address
from tandem.adapters.deployment import Deployment, Model, read
from tandem.adapters.grpc_server import GrpcServer
from tandem.adapters.nats_bus import NatsBus
from tandem.adapters.process_metrics import instruments_of, label_domains, metrics_endpoint, watch_tracing
from tandem.adapters.redis_store import RedisCounters, RedisLeases, RedisPrefixIndex, RedisRegistry, connect
from tandem.adapters.traces import open_tracing
from tandem.core.policy import RequestClass, Tenant, policy_from
from tandem.core.scheduler import Scheduler
from tandem.errors import ConfigError
from tandem.telemetry.instruments import Instruments
from tandem.v1 import router_pb2, router_pb2_grpc

log = logging.getLogger(__name__)


async def run(settings: RouterSettings) -> None:
    """Runs until SIGTERM."""
    deployment = read(settings.deployment)
    router = settings.instance or clock.new_name("router")
    async with contextlib.AsyncExitStack() as stack:
        bus = await NatsBus.connect(settings.nats_url, name=router)
        stack.push_async_callback(bus.close)
        redis = await connect(settings.redis_url)
        stack.push_async_callback(redis.aclose)
        cluster = deployment.cluster
        instruments = instruments_of("router", deployment, bus)
        tracing = open_tracing(settings, "router", cluster=cluster, instance=router)
        watch_tracing(instruments, tracing)
        stack.push_async_callback(tracing.close)
        ports = Ports(
            bus,
            RedisRegistry(redis, cluster),
            RedisLeases(redis, cluster),
            RedisPrefixIndex(redis, cluster),
            RedisCounters(redis, cluster),
        )
        routers = {
            model.name: ModelRouter(
                settings=settings,
                router=router,
                cluster=cluster,
                model=model.name,
                liveness=deployment.liveness,
                scheduler=stack.enter_context(_scheduler(settings, deployment, model, router)),
                ports=ports,
                metrics=RouterMetrics(instruments, model.name, [c.name for c in deployment.classes]),
                traces=RouterTraces(tracing, router, clock.monotonic),
                now=clock.monotonic,
            )
            for model in deployment.models
        }
        server = GrpcServer(own_address(settings.grpc_host), settings.grpc_port)
        control = RouterControl(routers, router, clock.monotonic)
        router_pb2_grpc.add_RouterServiceServicer_to_server(control, server.server)
        await server.start(router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name)
        stack.push_async_callback(server.stop)
        await stack.enter_async_context(metrics_endpoint(settings, instruments))
        log.info("%s serves RouterService on port %d", router, server.port)
        await _until_terminated(routers, settings.deployment, instruments)


async def _until_terminated(routers: dict[str, ModelRouter], deployment_file: str, instruments: Instruments) -> None:
    """A crash in any model's loops ends the process. SIGHUP reads the policy anew."""
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, routers, deployment_file, instruments)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(router.run()) for router in routers.values()]
        await leave.wait()
        for task in running:
            task.cancel()


def _reload(routers: dict[str, ModelRouter], deployment_file: str, instruments: Instruments) -> None:
    """Policy, classes and tenants. A wrong file changes nothing."""
    try:
        deployment = read(deployment_file)
        policy = policy_from(deployment.policy)
    except ConfigError as error:
        log.error("deployment file not reloaded: %s", error.message)
        return
    instruments.allow(label_domains(deployment))
    for router in routers.values():
        router.reconfigure(policy, _classes(deployment), _tenants(deployment))
    log.info("reloaded: %s", policy)


def _classes(deployment: Deployment) -> dict[str, RequestClass]:
    return {c.name: RequestClass(**c.model_dump()) for c in deployment.classes}


def _tenants(deployment: Deployment) -> dict[str, Tenant]:
    return {t.name: Tenant(name=t.name, weight=t.weight, request_class=t.request_class) for t in deployment.tenants}


@contextlib.contextmanager
def _scheduler(settings: RouterSettings, deployment: Deployment, model: Model, router: str) -> Iterator[Scheduler]:
    # Ties between equal plans only: any seed does.
    seed = clock.new_incarnation()
    policy, classes, tenants = policy_from(deployment.policy), _classes(deployment), _tenants(deployment)
    profiles = timing.known(deployment)
    folder = settings.record or deployment.record.folder
    if not folder:
        yield Scheduler(policy, classes=classes, tenants=tenants, rng=random.Random(seed), profiles=profiles)
        return
    recording = recording_for(
        Path(folder).expanduser(),
        model.name,
        settings.instance,
        clock.unix_milliseconds(),
        deployment.record.max_mb << 20,
    )
    log.info("%s: decisions are recorded in %s", model.name, recording.path)
    with contextlib.closing(recording):
        yield RecordingScheduler(
            policy,
            classes=classes,
            tenants=tenants,
            seed=seed,
            profiles=profiles,
            recording=recording,
            model=model.name,
            router=router,
            now=clock.monotonic(),
        )
