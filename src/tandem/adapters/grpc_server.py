"""gRPC servers and channels, set up the same way everywhere: health per service, reflection, limits, keep-alive."""

from __future__ import annotations

import os
import socket
import stat

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.errors import ConfigError

_MAX_MESSAGE_BYTES = 32 << 20
_COMMON = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER = (
    *_COMMON,
    ("grpc.so_reuseport", 0),  # else a second process on the same port steals half of the calls
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)
_CHANNEL = (
    *_COMMON,
    ("grpc.enable_http_proxy", 0),  # control traffic stays in the cluster
    ("grpc.use_local_subchannel_pool", 1),  # a restarted peer does not inherit its predecessor's back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # gRPC's name for how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
)
_STATUS = health_pb2.HealthCheckResponse


class GrpcServer:
    """Bound when it is made, so that ``port`` is known; add the servicers to ``server``, then ``start``."""

    def __init__(
        self,
        host: str,
        port: int = 0,
        *,
        credentials: grpc.ServerCredentials | None = None,
        max_request_bytes: int = _MAX_MESSAGE_BYTES,
        connection_age_s: float | None = None,
    ) -> None:
        """``port`` 0 = any free one. ConfigError when it is taken.

        gRPC itself ends a call with a message over ``max_request_bytes``, compressed or not, as RESOURCE_EXHAUSTED.
        A client whose connection is ``connection_age_s`` old, give or take a tenth, is told to open another one; calls
        that run on the old one go on.
        """
        options = {**dict(_SERVER), "grpc.max_receive_message_length": max_request_bytes}
        if connection_age_s is not None:
            options["grpc.max_connection_age_ms"] = int(connection_age_s * 1e3)
        self.server = grpc.aio.server(options=tuple(options.items()))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                self.port = self.server.add_insecure_port(address)
            else:
                self.port = self.server.add_secure_port(address, credentials)
        except RuntimeError:
            raise ConfigError(f"gRPC cannot listen on {address}: is the port taken?", param="grpc_port") from None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in the stubs
        self._services: tuple[str, ...] = ()

    async def start(self, *services: str) -> None:
        """``services``: full names, for health and reflection. All of them are SERVING from now on."""
        self._services = services
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server)
        await self.set_serving(True)
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        """What health checks hear, of the server as a whole and of each service."""
        for service in ("", *self._services):
            await self._health.set(service, _STATUS.SERVING if serving else _STATUS.NOT_SERVING)

    def stop_listening(self) -> None:
        """No new connections from now on, and the port is free; calls over those that are there go on and may come."""
        # gRPC itself can only end both at once, and with them calls that it has not begun (docs/decisions/leaving.md).
        # So its listening descriptor is made to name a socket on which nothing ever happens.
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if _listens_on(descriptor, self.port):
                with socket.socket() as nothing:
                    os.dup2(nothing.fileno(), descriptor, inheritable=False)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Not serving and no new calls from now on; those that run have ``grace_s``, then they are cancelled."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


def _listens_on(descriptor: int, port: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        with socket.socket(fileno=os.dup(descriptor)) as found:
            return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) and found.getsockname()[1] == port
    except OSError:  # closed since it was listed, or not of the internet
        return False


def open_channel(address: str, *, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    """Connects on the first call and again whenever it must. Every call needs a ``timeout`` of its own."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL)
    return grpc.aio.secure_channel(address, credentials, options=_CHANNEL)
