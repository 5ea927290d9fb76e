"""A whole cluster as processes of this machine: brought up in order, watched, taken down in order.

Up: the servers first (the engine's import beside them), then everything else at once; each service finds the others by
itself. Down: frontends, which let their streams finish; workers; routers; servers. The state of it all is written to
the run folder at every change.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tandem.adapters.deployment import Deployment
from tandem.adapters.embedded import ServerCommand, free_port, nats_command, redis_command
from tandem.adapters.processes import run_directly
from tandem.adapters.readiness import Probe, grpc_serving, http_ok
from tandem.adapters.supervision import Child, ProcessSpec, RestartPolicy, State, Supervisor
from tandem.cli.cluster import DRAIN_S, Kind, Service, Surroundings, named_ports, reachable, services_of
from tandem.cli.control import workers
from tandem.cli.launch import QUIET_ENGINE, ForkedWorkers
from tandem.cli.rundir import DEPLOYMENT, ClusterState, ProcessState, RunDir
from tandem.errors import NoLeader

_SERVER_START_S = 10.0
_SERVICE_START_S = 60.0
#: A large model is read from disk first.
_ENGINE_START_S = 600.0
#: From SIGINT to SIGKILL: a short drain, and time to leave after it.
_GRACE_S = {
    Kind.FRONTEND: DRAIN_S + 4,
    Kind.PREFILL: DRAIN_S + 4,
    Kind.DECODE: DRAIN_S + 4,
    Kind.ROUTER: 5.0,
    Kind.CONSOLE: 5.0,
}
_SERVER_GRACE_S = 5.0
#: Longest wait for the routers to know the workers, and the time between two looks.
_ACQUAINTED_S, _LOOK_S = 15.0, 0.1
#: As nats-server marks it.
_SERVER_TROUBLE = re.compile(r"\[(WRN|ERR|FTL)\]")


@dataclass(frozen=True)
class Sources:
    """What the cluster does not bring itself. Empty URL = start a server of our own."""

    nats_url: str
    redis_url: str
    log_level: str
    console_token: str
    #: The user's environment, without settings of ours.
    env: Mapping[str, str]


class LocalCluster:
    def __init__(
        self,
        deployment: Deployment,
        run_dir: RunDir,
        sources: Sources,
        *,
        on_line: Callable[[str, str], None],
        on_note: Callable[[str], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        """Call with the run folder held."""
        self._deployment = deployment
        self._run_dir = run_dir
        self._sources = sources
        self._on_line = on_line
        self._on_note = on_note
        self._ready = False
        self._servers: list[ServerCommand] = []
        unnamed_port = partial(free_port, but=named_ports(deployment))
        if not sources.nats_url:
            self._servers.append(nats_command(port=unnamed_port(), store_dir=run_dir.kept / "jetstream"))
        if not sources.redis_url:
            # Not in the run folder: that may go when its user logs out (XDG_RUNTIME_DIR), and the cluster stay.
            self._servers.append(redis_command(port=unnamed_port(), folder=run_dir.kept))
        urls = {server.name: server.url for server in self._servers}
        deployment_file = run_dir.path / DEPLOYMENT
        deployment_file.write_text(deployment.to_yaml())
        self._around = Surroundings(
            deployment_file=deployment_file,
            nats_url=sources.nats_url or urls["nats-server"],
            redis_url=sources.redis_url or urls["redis"],
            log_level=sources.log_level,
            worker_dir=run_dir.folder,
            free_port=unnamed_port,
            console_token=sources.console_token,
        )
        self.services = {service.name: service for service in services_of(deployment, self._around)}
        self._supervisor = Supervisor(on_line=self._show, on_news=self._news, policy=policy)
        self._engine_env = sources.env if sources.log_level == "DEBUG" else {**QUIET_ENGINE, **sources.env}
        self._forked = ForkedWorkers(env=self._engine_env, on_line=lambda line: on_line("engine", line))

    @property
    def names(self) -> list[str]:
        """Of all processes whose output is shown."""
        return [*(server.name for server in self._servers), *self.services, "engine"]

    async def up(self) -> None:
        """Returns when everything is ready. StartFailed or ConfigError when something does not get there."""
        if any(service.engine == "vllm" for service in self.services.values()):
            self._forked.begin()
        for server in self._servers:
            self._supervisor.add(self._server_spec(server))
        await self._supervisor.wait_ready(server.name for server in self._servers)
        for service in self.services.values():
            self._supervisor.add(self._service_spec(service))
        await self._supervisor.wait_ready(self.services)
        await self._wait_acquainted()
        self._ready = True
        self._write_state()

    async def _wait_acquainted(self) -> None:
        """A router hears of a ready worker a moment later; the first request should not come in between. Where that
        takes long, something is amiss that requests will be told of."""
        wanted = {service.name for service in self.services.values() if service.model}
        routers = [s for s in self.services.values() if s.kind is Kind.ROUTER]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ACQUAINTED_S):
                for router in routers:
                    address = f"{reachable(router.grpc_host)}:{router.grpc_port}"
                    while True:
                        if wanted <= await asyncio.to_thread(_known_to, address):
                            break
                        await asyncio.sleep(_LOOK_S)

    async def wait_failed(self) -> None:
        """Raises when a process is given up; returns never."""
        await self._supervisor.wait_failed()

    async def down(self) -> None:
        self._ready = False
        stages = [
            self._of(Kind.FRONTEND),
            self._of(Kind.PREFILL, Kind.DECODE),
            self._of(Kind.ROUTER, Kind.CONSOLE),
            [server.name for server in self._servers],
        ]
        await self._supervisor.stop(stages)
        await self._forked.close()

    def kill(self) -> None:
        """At once; ``down`` then returns soon."""
        self._supervisor.kill_all()

    def state(self) -> ClusterState:
        frontends = [s for s in self.services.values() if s.kind is Kind.FRONTEND]
        consoles = [s for s in self.services.values() if s.kind is Kind.CONSOLE]
        return ClusterState(
            cluster=self._deployment.cluster,
            supervisor_pid=os.getpid(),
            ready=self._ready,
            models=tuple(model.name for model in self._deployment.models),
            http=tuple(dict.fromkeys(f"http://{reachable(s.http_host)}:{s.http_port}" for s in frontends)),
            grpc=tuple(f"{reachable(s.grpc_host)}:{s.grpc_port}" for s in frontends),
            routers=tuple(s.grpc for s in self.services.values() if s.kind is Kind.ROUTER),
            console=f"http://{reachable(consoles[0].http_host)}:{consoles[0].http_port}" if consoles else "",
            nats_url=self._around.nats_url,
            redis_url=self._around.redis_url,
            processes=tuple(self._process_state(child) for child in self._supervisor.children.values()),
        )

    def _process_state(self, child: Child) -> ProcessState:
        service = self.services.get(child.spec.name)
        return ProcessState(
            name=child.spec.name,
            kind=service.kind.value if service else "server",
            pid=child.pid,
            state=child.state.value,
            restarts=child.restarts,
            grpc=service.grpc if service else "",
            metrics=service.metrics if service else "",
        )

    def _of(self, *kinds: Kind) -> list[str]:
        return [name for name, service in self.services.items() if service.kind in kinds]

    def _server_spec(self, server: ServerCommand) -> ProcessSpec:
        return ProcessSpec(
            name=server.name,
            launch=run_directly(server.argv),
            env={**self._sources.env, **server.env},
            ready=server.ready,
            start_timeout_s=_SERVER_START_S,
            grace_s=_SERVER_GRACE_S,
        )

    def _service_spec(self, service: Service) -> ProcessSpec:
        forked = service.engine == "vllm"
        module = service.kind.module
        return ProcessSpec(
            name=service.name,
            launch=self._forked.runs(module) if forked else run_directly([sys.executable, "-m", module]),
            env={**(self._engine_env if forked else self._sources.env), "PYTHONUNBUFFERED": "1", **service.env},
            ready=_probe(service),
            start_timeout_s=_ENGINE_START_S if forked else _SERVICE_START_S,
            stop_signal=signal.SIGINT,
            grace_s=_GRACE_S[service.kind],
            hands_over=service.kind is Kind.FRONTEND,
        )

    def _news(self, child: Child, news: str) -> None:
        # Ordinary comings and goings are in the state file; the terminal shows what somebody waits for or must know.
        leaving = child.state in (State.STOPPING, State.STOPPED) and news == child.state.value
        if not leaving and (child.state is not State.STARTING or child.restarts):
            self._on_note(f"{child.spec.name}: {news}")
        self._write_state()

    def _show(self, name: str, line: str) -> None:
        """The servers' small talk is for those who asked for it; the supervisor keeps their last lines anyway."""
        if name in self.services or self._sources.log_level == "DEBUG" or _SERVER_TROUBLE.search(line):
            self._on_line(name, line)

    def _write_state(self) -> None:
        self._run_dir.write_state(self.state())


def _probe(service: Service) -> Probe:
    if service.kind in (Kind.FRONTEND, Kind.CONSOLE) and not service.http_shared:
        return http_ok(reachable(service.http_host), service.http_port, "/readyz")
    return grpc_serving(reachable(service.grpc_host), service.grpc_port)


def _known_to(router: str) -> set[str]:
    try:
        return {worker.info.ref.id for worker in workers(router)}
    except NoLeader:
        return set()
