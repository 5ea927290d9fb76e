"""Settings of the frontend."""

from __future__ import annotations

from dataclasses import dataclass

from services.frontend.order import Patience
from tandem.adapters.settings import CommonSettings, option

_USUAL = Patience()


@dataclass(frozen=True, kw_only=True)
class FrontendSettings(CommonSettings):
    http_host: str = option("", doc="Interface of the HTTP server; the deployment file's when empty.")
    http_port: int = option(-1, doc="Port of the HTTP server; 0 = any free one, -1 = the deployment file's.")
    http_shared: bool = option(False, doc="Other frontends listen on the same HTTP port (SO_REUSEPORT).")
    grpc_host: str = option("", doc="Interface of the gRPC server; the deployment file's when empty.")
    grpc_port: int = option(-1, doc="Port of the gRPC server; 0 = any free one, -1 = the deployment file's.")
    drain_timeout_s: float = option(600.0, doc="Longest wait for open answers after SIGTERM.")
    interrupt_timeout_s: float = option(5.0, doc="The same after SIGINT (Ctrl-C): somebody waits.")
    idle_s: float = option(10.0, doc="A quiet stream opens, and then gets a comment, after this long.")
    leader_grace_s: float = option(_USUAL.leader_grace_s, doc="Longest wait for a router that leads the model.")
    bus_grace_s: float = option(_USUAL.bus_grace_s, doc="Longest wait for the message bus to come back.")
    recovery_grace_s: float = option(_USUAL.recovery_grace_s, doc="Longest wait for another worker after one was lost.")
    stall_s: float = option(_USUAL.stall_s, doc="A worker that is silent about a request for this long is asked.")
    lost_s: float = option(_USUAL.lost_s, doc="A worker that answers no question for this long is given up.")
    max_failures: int = option(_USUAL.max_failures, doc="Failed attempts after which a request fails.")

    @property
    def patience(self) -> Patience:
        return Patience(
            leader_grace_s=self.leader_grace_s,
            bus_grace_s=self.bus_grace_s,
            recovery_grace_s=self.recovery_grace_s,
            stall_s=self.stall_s,
            lost_s=self.lost_s,
            max_failures=self.max_failures,
        )
