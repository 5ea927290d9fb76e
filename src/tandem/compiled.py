"""The decision core, the engine model and the simulator's inner loop as machine code, where somebody has compiled them.

mypyc makes an extension module of each of the very same source files: twice as fast, the same decisions bit for bit
(`tests/unit/sim/test_compiled.py`). `scripts/compile.py` does it, as a step of the set-up; nothing needs it.

What is compiled lies in the virtual environment, in a folder that is named after the content of the sources. So a
source that was edited since runs as Python again, and nobody ever runs machine code of another text.
`python -X tandem-interpreted` runs the sources in any case: for a debugger, or a comparison.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent
STORE = Path(sys.prefix) / "tandem-compiled"
#: Not compiled: classes whose annotations msgspec reads at run time (mypyc leaves none), or that are collections of the
#: standard library's kind, and what runs once per study.
_LEFT_OUT = {
    "core": {"holders", "policy", "profiles", "types"},
    "enginemodel": set[str](),
    "sim": {
        "cli",
        "index",
        "picture",
        "plan_report",
        "planning",
        "report",
        "study",
        "synthetic",
        "tables",
        "traces",
        "workload",
    },
}


def sources() -> list[Path]:
    """Files that are compiled, in a fixed order."""
    return [
        path
        for package, left_out in _LEFT_OUT.items()
        for path in sorted((SOURCES / package).glob("*.py"))
        if path.stem not in left_out | {"__init__"}
    ]


@functools.cache
def folder() -> Path:
    """Where the machine code of these sources lies, or would lie, for this Python."""
    digest = hashlib.sha256(sys.version.encode())
    for path in (Path(__file__), *sources()):
        digest.update(path.name.encode() + path.read_bytes())
    return STORE / digest.hexdigest()[:16]


def with_compiled(package: str, path: Iterable[str]) -> list[str]:
    """``__path__`` of ``package`` with its compiled modules, if there are any, before the sources."""
    path = list(path)
    if not STORE.is_dir() or "tandem-interpreted" in sys._xoptions or not folder().is_dir():
        return path
    # What is on sys.path is there in spawned processes, too, and comes before an editable install: so it holds the
    # library that the modules share, and nothing named tandem.
    library = str(folder() / "library")
    if library not in sys.path:
        sys.path.append(library)
    return [str(folder().joinpath("modules", *package.split("."))), *path]


def pickled_by_fields(cls: type[Any]) -> None:
    """For a frozen dataclass that goes between processes: compiled, it cannot be unpickled as others are."""
    names = [field.name for field in dataclasses.fields(cls)]
    copyreg.pickle(cls, lambda made: (cls, tuple(getattr(made, name) for name in names)))
