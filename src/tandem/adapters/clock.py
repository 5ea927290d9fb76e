"""The clock and the randomness of a live process. Everything else takes ``now`` and ids as arguments."""

from __future__ import annotations

import random
import secrets
import time

_random = random.Random()

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


def new_id() -> str:
    """128 random bits as hex, for what only must not be the same twice: no secret, and no system call for each."""
    return f"{_random.getrandbits(128):032x}"


def new_name(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(4)}"
