"""Settings of the console."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.adapters.settings import CommonSettings, option
from tandem.errors import ConfigError

#: What a browser may call this machine. Anything else in a Host header, while nobody needs a token, is somebody's
#: attempt to have a page of theirs read ours (DNS rebinding).
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, kw_only=True)
class ConsoleSettings(CommonSettings):
    http_host: str = option("127.0.0.1", doc="Interface of the web page. Beyond loopback only with a token.")
    http_port: int = option(8400, doc="Port of the web page; 0 = any free one.")
    console_token: str = option("", doc="What a browser must show; needed beyond loopback. 16 characters at least.")
    routers: str = option("", doc="host:port of each router's gRPC server, comma-separated.")
    frontends: str = option("", doc="host:port of each frontend's gRPC server, comma-separated; for trying it out.")
    frontend_metrics: str = option(
        "", doc="URL of each frontend's metrics, comma-separated: rates are theirs; empty = of traced requests only."
    )
    trace_ring: int = option(2000, doc="Traces that are kept, the newest ones.")
    kept_traces: int = option(500, doc="Slow and failed traces that are kept beyond that.")
    map_history_s: float = option(120.0, doc="How far back the space-time map goes for a page that has just opened.")

    def check(self) -> None:
        """ConfigError for what would show the cluster to strangers."""
        if self.http_host not in LOOPBACK_NAMES and not self.console_token:
            raise ConfigError(
                f"the console shows everybody's requests: on {self.http_host} it needs TANDEM_CONSOLE_TOKEN",
                param="console_token",
            )
        if self.console_token and len(self.console_token) < 16:
            raise ConfigError("TANDEM_CONSOLE_TOKEN must have 16 characters at least", param="console_token")
        if self.trace_ring < 1 or self.kept_traces < 0 or self.map_history_s <= 0:
            raise ConfigError("TANDEM_TRACE_RING, TANDEM_KEPT_TRACES and TANDEM_MAP_HISTORY_S must be positive")


def addresses(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
