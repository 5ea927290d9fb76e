"""Several frontend processes behind one port: both serve, and one that is killed is not missed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx

from tests.harness.cluster import Cluster, wait_for

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def answered(cluster: Cluster) -> bool:
    """Over a connection of its own, which the kernel gives to either process."""
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=BODY, timeout=60.0).status_code == 200


def test_two_processes_share_the_port(tmp_path: Path) -> None:
    pool = {"role": "aggregated", "engine": "sim", "engine_args": {"speedup": 0}}
    model = {"name": "m", "path": "SmolLM2-135M-Instruct", "pools": [pool]}
    deployment = {"cluster": "shared", "processes": 2, "models": [model], "console": {"enabled": False}}
    with Cluster(deployment, tmp_path).start(120.0) as cluster:
        assert len(cluster.state()["http"]) == 1
        assert len(cluster.state()["grpc"]) == 2

        def frontends() -> list[dict[str, object]]:
            return [process for process in cluster.state()["processes"] if process["kind"] == "frontend"]

        assert [process["name"] for process in frontends()] == ["frontend-1", "frontend-2"]
        assert all(answered(cluster) for _ in range(16))
        os.kill(int(str(frontends()[0]["pid"])), signal.SIGKILL)
        wait_for(lambda: frontends()[0]["restarts"] == 1, 60.0, "the killed one is started again")
        assert all(answered(cluster) for _ in range(8))
        wait_for(lambda: all(p["state"] == "ready" for p in frontends()), 60.0, "both are ready")
        assert all(answered(cluster) for _ in range(16))
