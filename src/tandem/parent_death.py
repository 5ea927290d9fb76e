"""A process that does not outlive its parent, not even when the parent is killed with SIGKILL (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # before any fork: no imports in a child


def die_with_parent(parent_pid: int) -> None:
    """Called in the child: SIGKILL when the parent's *thread* that forked us ends, so fork from the main thread.

    No-op on other systems.
    """
    if _libc is None:
        return
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died between the fork and the line above
        os._exit(1)
