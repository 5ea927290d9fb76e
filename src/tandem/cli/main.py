"""`tandem`: one table of commands, each a module with ``add_arguments(parser)`` and ``run(args) -> exit status``.

A command's module is imported only when it is called for. A user's mistake is one message and status 2, never a stack
trace.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from tandem.cli.terminal import complain
from tandem.errors import TandemError

PYTHON = (3, 11)
EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130

#: Name: (module, what it does).
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("tandem.cli.up", "start a cluster in the foreground"),
    "chat": ("tandem.cli.chat", "talk to a model of a running cluster"),
    "status": ("tandem.cli.status", "show workers, roles, load and leaders of a running cluster"),
    "explain": ("tandem.cli.explain", "show where a prompt would run, and why"),
    "policy": ("tandem.cli.policy", "show or change what the router decides by"),
    "role": ("tandem.cli.role", "give a running worker another role"),
    "top": ("tandem.cli.top", "watch workers, load and queue live"),
    "trace": ("tandem.cli.trace", "show where a request's time went"),
    "sim": ("tandem.sim.cli", "replay a workload on a simulated fleet, in virtual time"),
    "plan": ("tandem.cli.plan", "find the cheapest fleet that serves a workload"),
    "profile": ("tandem.cli.profile", "fit a timing profile to this machine's engine"),
    "version": ("tandem.cli.version", "print the version"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits the process."""
    if sys.version_info[:2] != PYTHON:
        wanted, found = (".".join(map(str, version)) for version in (PYTHON, sys.version_info[:2]))
        complain(f"Tandem needs Python {wanted}, and this is Python {found} ({sys.executable})")
        sys.exit(EXIT_MISTAKE)
    sys.exit(dispatch(sys.argv[1:] if argv is None else list(argv)))


def dispatch(argv: Sequence[str]) -> int:
    """Runs one command. SystemExit comes from argparse alone."""
    parser, name = _parser(argv)
    args = parser.parse_args(argv)
    if name is None:
        parser.print_help()
        return EXIT_MISTAKE
    module = importlib.import_module(COMMANDS[name][0])
    try:
        return int(module.run(args))
    except TandemError as error:
        complain(error.message)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, str | None]:
    """The whole parser, but with the options of the called command alone: the others stay unimported."""
    parser = argparse.ArgumentParser(prog="tandem", description="Disaggregated serving of large language models.")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == called:
            importlib.import_module(module).add_arguments(command)
    return parser, called if called in COMMANDS else None


if __name__ == "__main__":
    main()
