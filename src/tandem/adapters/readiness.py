"""Is a service ready? One quick attempt each; what is not there yet is not an error.

gRPC health v1 with the empty service name, or HTTP ``GET`` answered with 200.

    python -m tandem.adapters.readiness grpc://HOST:PORT | http://HOST:PORT/PATH

ends with status 0 if so, for whoever checks from outside (a container's health check).
"""

from __future__ import annotations

import asyncio
import http.client
import sys
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from tandem.adapters.addresses import own_address

ATTEMPT_S = 1.0
CHECK_S = 5.0

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


def check(url: str) -> bool:
    """The same for a process that asks once and ends: no event loop, whose import would cost most. ValueError for a
    URL of another kind."""
    parts = urlsplit(url)
    host, port = own_address(parts.hostname or ""), parts.port
    if not host or port is None or parts.scheme not in ("grpc", "http"):
        raise ValueError(f"{url!r} is neither grpc://HOST:PORT nor http://HOST:PORT/PATH")
    return _grpc_check(host, port) if parts.scheme == "grpc" else _http_check(host, port, parts.path or "/")


def _grpc_check(host: str, port: int) -> bool:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"{host}:{port}", options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CHECK_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _http_check(host: str, port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=CHECK_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not check(sys.argv[1]))
