"""Memory of this process as the system sees it."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """What was needed for a while only, such as a tokenizer's file while it is read, goes back to the system: glibc
    keeps it otherwise. With another C library nothing happens."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
