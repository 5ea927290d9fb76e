"""`tandem up --engine sim`, from outside: what it starts, what it says, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness.cluster import Cluster, wait_for

START_S = 60.0
DEPLOYMENT: dict[str, Any] = {
    "models": [
        {
            "name": "words",
            "path": "SmolLM2-135M-Instruct",
            "pools": [
                {"role": "prefill", "engine": "sim", "engine_args": {"speedup": 20}},
                {"role": "decode", "engine": "sim", "engine_args": {"speedup": 20}},
            ],
        }
    ]
}
NAMES = {"nats-server", "redis", "router", "prefill-1", "decode-1", "frontend", "console"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(DEPLOYMENT, tmp_path_factory.mktemp("up")) as made:
        yield made.start(START_S)


def tandem(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command beside the running cluster, which it finds by its run folder."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    env["XDG_RUNTIME_DIR"] = env["XDG_STATE_HOME"] = str(cluster.folder)
    command = [sys.executable, "-m", "tandem.cli.main", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_everything_runs_as_a_process_of_its_own(cluster: Cluster) -> None:
    processes = cluster.state()["processes"]
    assert {p["name"] for p in processes} == NAMES
    assert {p["state"] for p in processes} == {"ready"}
    assert {p["pid"] for p in processes} == {child.pid for child in family(cluster.pid)}


def test_it_says_how_to_talk_to_it(cluster: Cluster) -> None:
    wait_for(lambda: "Ctrl-C stops it." in cluster.log(), 10, "the banner")
    log = cluster.log()
    for hint in (f"{cluster.url}/v1", cluster.grpc, cluster.state()["console"], "curl -N", "grpcurl", "chat"):
        assert hint in log


def test_chat_answers_in_so_many_words(cluster: Cluster) -> None:
    done = tandem(cluster, "chat", "say something", "--max-tokens", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == 5


def test_status_shows_workers_and_leader(cluster: Cluster) -> None:
    done = tandem(cluster, "status")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["words", "router"] in [line[:2] for line in lines]
    workers = {tuple(line[:4]) for line in lines}
    assert {("prefill-1", "words", "prefill", "alive"), ("decode-1", "words", "decode", "alive")} <= workers


def test_a_second_one_on_the_same_ports_is_refused(cluster: Cluster) -> None:
    done = tandem(cluster, "up", "-f", str(cluster.deployment_file))
    assert done.returncode == 2
    assert f"up already (pid {cluster.pid})" in done.stderr
    other = tandem(cluster, "up", "-f", str(cluster.deployment_file), "--cluster", "other")
    assert other.returncode == 2
    assert f"HTTP port {cluster.http_port} on 127.0.0.1 is taken" in other.stderr
    assert "--http-port" in other.stderr
    assert "Traceback" not in done.stderr + other.stderr


@pytest.mark.parametrize("name", ["decode-1", "prefill-1", "router", "frontend", "console", "redis", "nats-server"])
def test_whatever_dies_comes_back_and_the_cluster_answers(cluster: Cluster, name: str) -> None:
    old = cluster.signal(name, signal.SIGKILL)
    cluster.wait_restarted(name, old, START_S)
    answers = wait_for(
        lambda: (done := tandem(cluster, "chat", "go on", "--max-tokens", "3")).returncode == 0 and done,
        START_S,
        "answer",
    )
    assert len(answers.stdout.split()) == 3


def test_ctrl_c_takes_everything_down(tmp_path: Path) -> None:
    cluster = Cluster(DEPLOYMENT, tmp_path).start(START_S)
    assert cluster.stop() == 0
    assert "everything has stopped" in cluster.log()
    assert not cluster.state()


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    cluster = Cluster(DEPLOYMENT, tmp_path).start(START_S)
    processes = family(cluster.pid)
    assert len(processes) == len(NAMES)
    os.kill(cluster.pid, signal.SIGKILL)
    try:
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not alive
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        cluster.stop()


def test_a_worker_that_refuses_its_options_ends_it_with_the_reason(tmp_path: Path) -> None:
    bad = {"models": [{**DEPLOYMENT["models"][0], "pools": [{"role": "aggregated", "engine": "sim",
           "engine_args": {"speed": 1}}]}]}  # fmt: skip
    cluster = Cluster(bad, tmp_path)
    done = tandem(cluster, "up", "-f", str(cluster.deployment_file))
    assert done.returncode == 2
    assert "error: aggregated-1 refused its configuration" in done.stderr
    assert "the simulated engine knows no option speed" in done.stderr
    assert "Traceback" not in done.stderr
