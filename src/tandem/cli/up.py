"""`tandem up`: a cluster in the foreground, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Coroutine
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tandem.adapters import deployment as deployment_file
from tandem.adapters import settings, timing
from tandem.adapters.clock import monotonic
from tandem.adapters.deployment import Deployment
from tandem.cli import deployments, preflight
from tandem.cli.banner import banner, describe
from tandem.cli.cluster import foreign_environment
from tandem.cli.local_cluster import LocalCluster, Sources
from tandem.cli.rundir import RunDir
from tandem.cli.terminal import Terminal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class UpSettings:
    """What `tandem up` takes from the environment."""

    nats_url: str = settings.option("", doc="Use this NATS server; empty = start one.")
    redis_url: str = settings.option("", doc="Use this Redis server; empty = start one.")
    console_token: str = settings.option("", doc="What the console asks of browsers; needed beyond loopback.")
    log_level: str = settings.option("INFO", doc="Log level of all services: DEBUG, INFO, WARNING or ERROR.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-f", "--file", metavar="FILE", help="deployment file; without it: SmolLM2, 1 prefill + 1 decode worker")
    add("--engine", choices=("vllm", "sim"), help="run all pools on this engine")
    add("--prefill", type=_bounded(0, 512), metavar="N", help="prefill workers")
    add("--decode", type=_bounded(0, 512), metavar="N", help="decode workers")
    add("--http-port", type=_bounded(1, 65535), metavar="PORT", help="of the OpenAI API (default: 8000)")
    add("--grpc-port", type=_bounded(1, 65535), metavar="PORT", help="of the gRPC API (default: 9000)")
    add("--console-port", type=_bounded(0, 65535), metavar="PORT", help="of the console; 0 = none (default: any free)")
    add("--processes", type=_bounded(1, 64), metavar="N", help="processes of the frontend, behind its one HTTP port")
    add("--cluster", metavar="NAME", help="name of the cluster (default: default)")
    add("--print-deployment", action="store_true", help="print what would be started, as a deployment file, and leave")


def _bounded(low: int, high: int) -> Any:
    def number(text: str) -> int:
        if text.isdecimal() and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")

    return number


def run(args: argparse.Namespace) -> int:
    given = settings.load(UpSettings)
    overrides = deployments.Overrides(**{f.name: getattr(args, f.name) for f in fields(deployments.Overrides)})
    base = deployment_file.read(args.file) if args.file else deployments.default()
    deployment = deployments.overridden(base, overrides)
    if args.print_deployment:
        print(deployment.to_yaml(), end="")
        return 0
    folder = Path(args.file).expanduser().resolve().parent if args.file else Path.cwd()
    env = foreign_environment(os.environ)
    sources = Sources(given.nats_url, given.redis_url, given.log_level, given.console_token, env)
    return asyncio.run(_run(deployment, folder, sources))


async def _run(deployment: Deployment, folder: Path, sources: Sources) -> int:
    began = monotonic()
    run_dir = RunDir(deployment.cluster, deployment.http.port)
    with run_dir.held():
        preflight.check_policy(deployment)
        preflight.check_ports(deployment)
        preflight.check_console(deployment, sources.console_token)
        preflight.check_room(run_dir.kept)
        preflight.check_engines(deployment)
        paths = preflight.find_models(deployment, folder, lambda line: print(line, flush=True))
        deployment = deployments.with_paths(deployment, paths, folder)
        timing.known(deployment)
        stop = asyncio.Event()
        terminal = Terminal(on_gone=stop.set)
        cluster = LocalCluster(deployment, run_dir, sources, on_line=terminal.line, on_note=terminal.note)
        terminal.expect(cluster.names)
        _handle_signals(cluster, stop, terminal)
        terminal.note(f"starting {describe(deployment)}; run folder {run_dir.path}")
        try:
            if not await _finished(cluster.up(), unless=stop):
                return EXIT_INTERRUPTED
            terminal.plain(banner(deployment, cluster.state(), monotonic() - began))
            await _finished(cluster.wait_failed(), unless=stop)
            return 0
        finally:
            await cluster.down()
            terminal.note("everything has stopped")


async def _finished(work: Coroutine[Any, Any, None], *, unless: asyncio.Event) -> bool:
    """Whether ``work`` came to its end (or raises what it raised) before the event."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(unless.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        task.cancel()
        stopped.cancel()
        await asyncio.wait({task, stopped})


def _handle_signals(cluster: LocalCluster, stop: asyncio.Event, terminal: Terminal) -> None:
    def handle(number: signal.Signals) -> None:
        if stop.is_set():
            terminal.note(f"{number.name} again: killing everything")
            cluster.kill()
        else:
            terminal.note(f"{number.name}: stopping in order; once more to kill everything at once")
            stop.set()

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, handle, number)
