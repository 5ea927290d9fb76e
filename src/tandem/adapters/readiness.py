"""Is a service ready? One quick attempt each; what is not there yet is not an error.

gRPC health v1 with the empty service name, or HTTP ``GET`` answered with 200.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

ATTEMPT_S = 1.0

Probe = Callable[[], Awaitable[bool]]


def grpc_serving(host: str, port: int) -> Probe:
    async def probe() -> bool:
        # Here, not at the top: whoever starts processes wants to have done so before it spends time on this.
        import grpc.aio
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        if not await _listens(host, port):  # a gRPC channel would wait a second before its next attempt
            return False
        async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=ATTEMPT_S
                )
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return probe


def http_ok(host: str, port: int, path: str) -> Probe:
    async def probe() -> bool:
        request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode()
        try:
            async with asyncio.timeout(ATTEMPT_S):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    writer.write(request)
                    return (await reader.readline()).split()[1:2] == [b"200"]
                finally:
                    writer.close()
        except (OSError, TimeoutError, ValueError):
            return False

    return probe


async def _listens(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(ATTEMPT_S):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
    except (OSError, TimeoutError):
        return False
    return True
