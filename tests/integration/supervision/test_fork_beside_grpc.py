"""Children start whole while gRPC calls are under way in the parent, as in a supervisor that probes its processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from functools import partial

from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.adapters.grpc_server import GrpcServer, open_channel
from tandem.parent_death import die_with_parent


def child() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-S", "-c", ""]
    return subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid()), stderr=subprocess.DEVNULL)


async def test_no_child_dies_between_fork_and_exec() -> None:
    server = GrpcServer("127.0.0.1", 0)
    await server.start("test.Service")

    async def probe() -> None:
        while True:
            async with open_channel(f"127.0.0.1:{server.port}") as channel:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)

    probes = [asyncio.create_task(probe()) for _ in range(4)]
    statuses = [await asyncio.to_thread(child().wait, 20) for _ in range(100)]
    for task in probes:
        task.cancel()
    await asyncio.gather(*probes, return_exceptions=True)
    await server.stop()
    assert statuses == [0] * 100
