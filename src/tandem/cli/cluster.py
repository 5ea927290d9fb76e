"""What a local cluster consists of: from a deployment to processes and their environments. Pure but for free ports.

Each service gets exactly the ``TANDEM_*`` variables that its settings class knows (services refuse the rest); whatever
else of the kind is in the user's environment does not reach them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from tandem.adapters.deployment import Deployment, Model, Pool, PoolRole
from tandem.adapters.settings import PREFIX

LOOPBACK = "127.0.0.1"
#: How long frontends let streams finish, and workers requests, when the cluster goes down: somebody waits for it. A
#: process that is told to leave by itself (SIGTERM) takes the time that it needs.
DRAIN_S = 5.0
#: Requests a second that each frontend has traced for the console, whatever the share of the rest: somebody who tries
#: it out sees every request, and a load test costs no more than this.
TRACES_PER_S = 2


class Kind(Enum):
    ROUTER = "router"
    PREFILL = "prefill"
    DECODE = "decode"
    FRONTEND = "frontend"
    CONSOLE = "console"

    @property
    def module(self) -> str:
        return f"services.{self.value}"


@dataclass(frozen=True)
class Service:
    """One process of ours to run."""

    name: str
    kind: Kind
    #: Its settings, and what the deployment file adds for its pool.
    env: Mapping[str, str]
    grpc_host: str
    grpc_port: int
    http_host: str = ""
    http_port: int = 0
    #: Other processes listen on the same port: who answers there says nothing about this one.
    http_shared: bool = False
    #: Empty for routers and frontends.
    model: str = ""
    engine: str = ""

    @property
    def grpc(self) -> str:
        return f"{self.grpc_host}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        if self.env["TANDEM_METRICS_PORT"] == "-1":
            return ""
        return f"{self.env['TANDEM_METRICS_HOST']}:{self.env['TANDEM_METRICS_PORT']}"


@dataclass(frozen=True)
class Surroundings:
    """What all services of one cluster share."""

    deployment_file: Path
    nats_url: str
    redis_url: str
    log_level: str
    worker_dir: Callable[[str], Path]
    free_port: Callable[[], int]
    console_token: str = ""
    _base: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        base = {
            "TANDEM_DEPLOYMENT": str(self.deployment_file),
            "TANDEM_NATS_URL": self.nats_url,
            "TANDEM_REDIS_URL": self.redis_url,
            "TANDEM_LOG_LEVEL": self.log_level,
        }
        object.__setattr__(self, "_base", base)

    def env(self, name: str, grpc_host: str, grpc_port: int, **more: str) -> dict[str, str]:
        return {
            **self._base,
            "TANDEM_INSTANCE": name,
            "TANDEM_GRPC_HOST": grpc_host,
            "TANDEM_GRPC_PORT": str(grpc_port),
            "TANDEM_METRICS_HOST": LOOPBACK,
            "TANDEM_METRICS_PORT": str(self.free_port()),
            **more,
        }


def named_ports(deployment: Deployment) -> frozenset[int]:
    """Those that the deployment names: nothing else may take one of them before its owner does."""
    http, grpc = deployment.http.port, deployment.grpc.port
    frontends, processes = deployment.frontends, deployment.processes
    return frozenset(
        {*range(http, http + frontends), *range(grpc, grpc + frontends * processes), deployment.console.port}
    )


def services_of(deployment: Deployment, around: Surroundings) -> list[Service]:
    """Routers, workers, frontends, console: in the order in which they are listed, not started."""
    routers = [_router(n, deployment, around) for n in range(deployment.routers)]
    frontends = [_frontend(n, deployment, around) for n in range(deployment.frontends * deployment.processes)]
    services = [
        *routers,
        *(
            _worker(model, pool, n, deployment, around)
            for model in deployment.models
            for pool in model.pools
            for n in range(pool.replicas)
        ),
        *frontends,
    ]
    if not deployment.console.enabled:
        return services
    console = _console(deployment, around, routers, frontends)
    traced = {"TANDEM_TRACE_CONSOLE": console.grpc, "TANDEM_TRACE_PER_S": str(TRACES_PER_S)}
    return [*(replace(service, env={**traced, **service.env}) for service in services), console]


def _router(n: int, deployment: Deployment, around: Surroundings) -> Service:
    name, port = _numbered("router", n, deployment.routers), around.free_port()
    return Service(name, Kind.ROUTER, around.env(name, LOOPBACK, port), LOOPBACK, port)


def _worker(model: Model, pool: Pool, n: int, deployment: Deployment, around: Surroundings) -> Service:
    name = worker_name(deployment, model, pool, n)
    port = around.free_port()
    own = {
        "TANDEM_MODEL": model.name,
        "TANDEM_POOL": pool.pool_name,
        "TANDEM_RUN_DIR": str(around.worker_dir(name)),
        "TANDEM_KV_HOST": LOOPBACK,
        "TANDEM_KV_PORT": str(around.free_port()),
        "TANDEM_INTERRUPT_TIMEOUT_S": str(DRAIN_S),
    }
    # An aggregated worker is a decode worker that never gets a handoff.
    kind = Kind.PREFILL if pool.role is PoolRole.PREFILL else Kind.DECODE
    env = {**pool.env, **around.env(name, LOOPBACK, port, **own)}
    return Service(name, kind, env, LOOPBACK, port, model=model.name, engine=pool.engine)


def worker_name(deployment: Deployment, model: Model, pool: Pool, n: int) -> str:
    """Unique in the cluster, and short where there is one model only."""
    if len(deployment.models) == 1:
        return f"{pool.pool_name}-{n + 1}"
    alike = [other.name for other in deployment.models if _slug(other.name) == _slug(model.name)]
    number = "" if len(alike) == 1 else str(alike.index(model.name) + 1)
    return f"{_slug(model.name)}{number}-{pool.pool_name}-{n + 1}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _frontend(n: int, deployment: Deployment, around: Surroundings) -> Service:
    """The ``n``-th process of all frontends."""
    name = _numbered("frontend", n, deployment.frontends * deployment.processes)
    http, grpc = deployment.http, deployment.grpc
    http_port = http.port + n // deployment.processes
    own = {
        "TANDEM_HTTP_HOST": http.host,
        "TANDEM_HTTP_PORT": str(http_port),
        "TANDEM_INTERRUPT_TIMEOUT_S": str(DRAIN_S),
    }
    if deployment.processes > 1:
        own["TANDEM_HTTP_SHARED"] = "1"
    env = around.env(name, grpc.host, grpc.port + n, **own)
    shared = deployment.processes > 1
    return Service(name, Kind.FRONTEND, env, grpc.host, grpc.port + n, http.host, http_port, http_shared=shared)


def _console(
    deployment: Deployment, around: Surroundings, routers: Sequence[Service], frontends: Sequence[Service]
) -> Service:
    name, host = "console", deployment.console.host
    http_port = deployment.console.port or around.free_port()
    grpc_port = around.free_port()
    own = {
        "TANDEM_HTTP_HOST": host,
        "TANDEM_HTTP_PORT": str(http_port),
        "TANDEM_ROUTERS": ",".join(router.grpc for router in routers),
        "TANDEM_METRICS_PORT": "-1",  # it has none of its own
        "TANDEM_FRONTEND_METRICS": ",".join(f"http://{f.metrics}/metrics" for f in frontends),
        "TANDEM_FRONTENDS": ",".join(f"{reachable(f.grpc_host)}:{f.grpc_port}" for f in frontends),
    }
    if around.console_token:
        own["TANDEM_CONSOLE_TOKEN"] = around.console_token
    env = around.env(name, LOOPBACK, grpc_port, **own)
    return Service(name, Kind.CONSOLE, env, LOOPBACK, grpc_port, host, http_port)


def reachable(host: str) -> str:
    """An address of this machine at which a server bound to ``host`` answers."""
    return LOOPBACK if host in ("0.0.0.0", "") else "[::1]" if host == "::" else host


def _numbered(name: str, n: int, count: int) -> str:
    return name if count == 1 else f"{name}-{n + 1}"


def foreign_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The user's environment without any setting of ours."""
    return {name: value for name, value in environ.items() if not name.startswith(PREFIX)}
