"""The clock and the randomness of a live process. Everything else takes ``now`` and ids as arguments."""

from __future__ import annotations

import secrets
import time

#: Seconds of this process's monotonic clock. Never compared with another process's.
monotonic = time.monotonic


def unix_milliseconds() -> int:
    """Wall clock; only the floor of a leader's epoch."""
    return int(time.time() * 1000)


def unix_nanoseconds() -> int:
    """Wall clock; what a trace says to the world."""
    return time.time_ns()


def new_incarnation() -> int:
    """Random, non-zero, 63 bits: tells one start of a process from another."""
    return secrets.randbits(62) + 1


def new_name(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(4)}"
