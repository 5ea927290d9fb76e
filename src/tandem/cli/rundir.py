"""Where a running local cluster leaves its traces, so that `tandem chat` and `tandem status` find it.

    $XDG_RUNTIME_DIR/tandem/<cluster>-<http port>/     else ~/.cache/tandem/run/...
        lock              held (flock) by the supervisor as long as it lives; the kernel lets go of it
        state.json        URLs, processes
        prometheus.json   where the processes' metrics are, as a Prometheus' file_sd_configs reads it
        deployment.yaml   the effective deployment, which every process of the cluster reads
        <worker>/         that worker's sockets

What must outlive a cluster (JetStream's files) is under $XDG_STATE_HOME/tandem, else ~/.local/state/tandem.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tandem.errors import ConfigError

_STATE, _TARGETS, _LOCK, DEPLOYMENT = "state.json", "prometheus.json", "lock", "deployment.yaml"


@dataclass(frozen=True, slots=True)
class ProcessState:
    name: str
    kind: str  # server | router | prefill | decode | frontend | console
    pid: int
    state: str
    restarts: int
    #: host:port of its gRPC server; "" = none.
    grpc: str = ""
    #: host:port of its Prometheus endpoint; "" = none.
    metrics: str = ""


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What the supervisor tells about its cluster."""

    cluster: str
    supervisor_pid: int
    ready: bool
    models: tuple[str, ...]
    http: tuple[str, ...]  # URLs of the frontends
    grpc: tuple[str, ...]  # host:port of the frontends
    routers: tuple[str, ...]  # host:port of the routers' gRPC servers
    nats_url: str
    redis_url: str
    processes: tuple[ProcessState, ...]
    console: str = ""  # URL; "" = none


def to_json(state: ClusterState) -> bytes:
    return msgspec.json.format(msgspec.json.encode(state), indent=1)


def metrics_targets(state: ClusterState) -> bytes:
    """For Prometheus: every process's endpoint, and what it is."""
    groups = [
        {
            "targets": [process.metrics],
            "labels": {"job": "tandem", "cluster": state.cluster, "process": process.name},
        }
        for process in state.processes
        if process.metrics
    ]
    return msgspec.json.format(msgspec.json.encode(groups), indent=1)


def run_root() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime, "tandem")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tandem", "run")


def state_root() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "tandem")


class RunDir:
    """The folder of one running cluster. Only whoever holds its lock writes."""

    def __init__(self, cluster: str, http_port: int) -> None:
        self.name = f"{cluster}-{http_port}"
        self.path = run_root() / self.name
        #: Outlives the cluster.
        self.kept = state_root() / self.name

    @contextmanager
    def held(self) -> Iterator[None]:
        """ConfigError if another supervisor holds it. Emptied at both ends, but for the lock itself."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.kept.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (self.path / _LOCK).open("w")
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {self.path}: {error.strerror or error}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = read_state(self.path)
                who = f" (pid {other.supervisor_pid})" if other else ""
                raise ConfigError(
                    f"a cluster with this name and HTTP port is up already{who}: {self.name}. "
                    "`tandem status` shows it; --http-port and --grpc-port start another beside it."
                ) from None
            self._empty()
            try:
                yield
            finally:
                self._empty()

    def folder(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(exist_ok=True, mode=0o700)
        return path

    def write_state(self, state: ClusterState) -> None:
        for name, content in ((_STATE, to_json(state)), (_TARGETS, metrics_targets(state))):
            fresh = self.path / f".{name}"
            fresh.write_bytes(content)
            fresh.replace(self.path / name)

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.name == _LOCK:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def read_state(folder: Path) -> ClusterState | None:
    """None where there is none, or one of another version."""
    try:
        return msgspec.json.decode((folder / _STATE).read_bytes(), type=ClusterState)
    except (OSError, msgspec.MsgspecError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a supervisor lives in it."""
    try:
        with (folder / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def running_clusters() -> dict[str, ClusterState]:
    """By name. Only those whose supervisor lives."""
    root = run_root()
    folders = sorted(root.iterdir()) if root.is_dir() else []
    states = ((folder.name, read_state(folder)) for folder in folders if is_held(folder))
    return {name: state for name, state in states if state is not None}


def deployment_of(state: ClusterState) -> Path:
    """The deployment file that a running cluster's processes read. ConfigError if it has gone meanwhile."""
    for name, running in running_clusters().items():
        if running.supervisor_pid == state.supervisor_pid:
            return run_root() / name / DEPLOYMENT
    raise ConfigError(f"the cluster {state.cluster} is not up any more")


def find_cluster(name: str = "") -> ClusterState:
    """The cluster of that name, or the only one. ConfigError says what there is instead."""
    running = running_clusters()
    if not running:
        raise ConfigError("no cluster is up on this machine; start one with `tandem up`")
    if name:
        named = [s for n, s in running.items() if name in (n, s.cluster)]
        if len(named) == 1:
            return named[0]
        raise ConfigError(f"no cluster {name!r}; there is: {', '.join(running)}")
    if len(running) > 1:
        raise ConfigError(f"several clusters are up; choose one by --cluster: {', '.join(running)}")
    return next(iter(running.values()))
