"""How a service's process begins and ends: logging, the event loop, and one line instead of a stack trace.

Exit status: 0 after an orderly end, 2 for a user's mistake (ConfigError, IncompatibleWorker), 1 for everything else.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from tandem.adapters import settings as settings_module
from tandem.adapters.settings import CommonSettings
from tandem.errors import ConfigError, IncompatibleWorker, TandemError

S = TypeVar("S", bound=CommonSettings)

#: The event loop gets the interpreter back from any other thread (traces on their way out, a long prompt's tokeniser)
#: after this, not after Python's 5 ms: with those, a hundredth of all requests waited 5 to 10 ms.
THREADS_YIELD_S = 0.0005


def run_service(cls: type[S], main: Callable[[S], Coroutine[Any, Any, None]], *, nice: int = 0) -> None:
    """Loads ``cls`` from the environment, runs ``main`` with it and exits the process. ``nice``: as nice(1), how far
    it gives way to other processes of its machine."""
    try:
        settings = settings_module.load(cls)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        if nice:
            _give_way(nice)
        collect_rarely()
        sys.setswitchinterval(THREADS_YIELD_S)
        uvloop.run(main(settings))
    except TandemError as error:
        _fail(error)
    except ExceptionGroup as group:
        known, unknown = group.split(TandemError)
        if unknown is not None:
            raise unknown from None
        assert known is not None
        _fail(_first(known))
    except KeyboardInterrupt:
        sys.exit(130)


def _give_way(nice: int) -> None:
    """Where the kernel shares its processors between sessions, it is the session's niceness that counts (sched(7))."""
    with contextlib.suppress(OSError):
        os.nice(nice)
        if os.getsid(0) == os.getpid():
            Path("/proc/self/autogroup").write_text(str(nice))


def collect_rarely() -> None:
    """A request makes hundreds of objects and no cycle. With the collector's own thresholds it took a ninth of a busy
    frontend's CPU, most of it on modules and classes, which never become garbage; and those of a few hundred requests
    in flight are soon more than its thresholds."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _first(group: BaseExceptionGroup[Any]) -> TandemError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _fail(error: TandemError) -> None:
    print(f"error: {error.message} [{error.code}]", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, ConfigError | IncompatibleWorker) else 1)
