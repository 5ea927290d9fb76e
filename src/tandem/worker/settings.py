"""Settings that prefill and decode workers share."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.adapters.settings import CommonSettings, option


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(CommonSettings):
    model: str = option(doc="Name of the model in the deployment file.")
    pool: str = option("", doc="Name of the pool in the deployment file; the service's own role when empty.")
    run_dir: str = option("", doc="Folder for this worker's sockets; a temporary one when empty.")
    kv_host: str = option("127.0.0.1", doc="Interface of the KV plane; it has no authentication: keep it private.")
    kv_port: int = option(0, doc="Port of the KV plane's side channel; 0 = any free one.")
    load_interval_s: float = option(0.1, doc="Time between load reports; of an idle engine 2.5 times that.")
    registry_ttl_s: float = option(10.0, doc="Life of the registry entry without a refresh.")
    hop_timeout_s: float = option(2.0, doc="Longest wait for another worker in a KV handoff.")
    retention_s: float = option(30.0, doc="How long a finished request's tokens are kept for gap repair.")
    drain_timeout_s: float = option(600.0, doc="Longest wait for running requests and handoffs after SIGTERM.")
    interrupt_timeout_s: float = option(5.0, doc="The same after SIGINT (Ctrl-C): somebody waits.")
    engine_hang_s: float = option(60.0, doc="Work pending and no engine step for this long: the worker leaves.")
