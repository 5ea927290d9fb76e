"""Settings of the router."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.adapters.settings import CommonSettings, option


@dataclass(frozen=True, kw_only=True)
class RouterSettings(CommonSettings):
    lease_ttl_s: float = option(1.5, doc="Life of the leader's lease without renewal.")
    announce_interval_s: float = option(0.25, doc="Time between a leader's announcements.")
    registry_interval_s: float = option(0.5, doc="Time between looks at the worker registry.")
    counters_interval_s: float = option(1.0, doc="Time between saves of the tenants' service counters.")
    record: str = option("", doc="Folder to record every decision in; the deployment file's `record` when empty.")
    ask_after_s: float = option(5.0, doc="Workers are asked about a placed request after this much silence.")
    hop_timeout_s: float = option(2.0, doc="A prefill worker silent for this long gives its prefills to others.")
