"""A link that carries one KV transfer after the other, at a fixed bandwidth."""

from __future__ import annotations


class Link:
    """First come, first served. The caller owns the clock."""

    def __init__(self, bytes_per_s: float, latency_s: float = 0.0) -> None:
        if bytes_per_s <= 0:
            raise ValueError("a link needs a bandwidth")
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self.free_at = 0.0

    def send(self, now: float, num_bytes: int) -> float:
        """When a transfer asked for at ``now`` will have arrived."""
        self.free_at = max(now, self.free_at) + num_bytes / self.bytes_per_s
        return self.free_at + self.latency_s
