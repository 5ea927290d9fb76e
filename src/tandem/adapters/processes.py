"""Operating-system processes behind one small port, so that a supervisor need not know how they come to be.

A ``Launch`` starts one process, with its output on a file descriptor, and returns a ``Process``. ``run_directly``
executes a command; the fork launcher of the engine (tandem.cli.launch) forks a process that has imported vLLM already.

Contract: a process never outlives the supervisor that launched it, however that one ends; a signal to a process that
is gone is a no-op; ``wait`` may be called any number of times and always gives the same status.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from tandem.errors import StartFailed
from tandem.parent_death import die_with_parent

#: A longer line of output is cut into pieces of this size.
MAX_LINE_BYTES = 16_384


class Process(Protocol):
    """One running process."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """Exit status; -N = ended by signal N."""
        ...

    def send_signal(self, number: signal.Signals) -> None: ...

    def kill(self) -> None:
        """SIGKILL to it and, as far as that can be known, to what it started."""
        ...


class Launch(Protocol):
    async def __call__(self, name: str, env: Mapping[str, str], output_fd: int) -> Process:
        """Starts it; stdout and stderr go to ``output_fd``, which stays the caller's. StartFailed."""
        ...


def run_directly(argv: Sequence[str]) -> Launch:
    """Executes ``argv`` in a session of its own: Ctrl-C in the terminal is the supervisor's to handle."""

    async def launch(name: str, env: Mapping[str, str], output_fd: int) -> Process:
        try:
            child = await asyncio.create_subprocess_exec(
                *argv,
                env=dict(env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output_fd,
                stderr=output_fd,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        except OSError as error:
            raise StartFailed(f"{name}: cannot execute {argv[0]}: {error.strerror or error}") from error
        return _DirectProcess(child)

    return launch


class _DirectProcess:
    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    async def wait(self) -> int:
        return await self._child.wait()

    def send_signal(self, number: signal.Signals) -> None:
        if self._child.returncode is None:
            _signal(os.kill, self.pid, number)

    def kill(self) -> None:
        # Even when it is gone itself: its session's other processes may not be.
        _signal(os.killpg, self.pid, signal.SIGKILL)


def _signal(send: Callable[[int, int], None], pid: int, number: signal.Signals) -> None:
    try:
        send(pid, number)
    except ProcessLookupError:
        return


class OutputPipe(asyncio.Protocol):
    """The reading end of a process's output: calls ``on_line`` with each line, without its newline."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self._transport: asyncio.ReadTransport | None = None
        #: Set when every process that held the other end has closed it.
        self.ended = asyncio.Event()

    async def open(self) -> int:
        """Returns the writing end, which the caller closes once the process has it."""
        read_fd, write_fd = os.pipe()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: self, os.fdopen(read_fd, "rb", buffering=0))
        self._transport = transport
        return write_fd

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line)
        if len(self._rest) >= MAX_LINE_BYTES:
            self._emit(self._rest)
            self._rest = b""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._rest:
            self._emit(self._rest)
            self._rest = b""
        self.ended.set()

    def _emit(self, line: bytes) -> None:
        for start in range(0, max(1, len(line)), MAX_LINE_BYTES):
            self._on_line(line[start : start + MAX_LINE_BYTES].decode(errors="replace").rstrip("\r"))

    async def close(self, *, within_s: float) -> None:
        """Reads what is still in the pipe, for at most ``within_s``: a grandchild may keep it open."""
        try:
            await asyncio.wait_for(self.ended.wait(), within_s)
        except TimeoutError:
            if self._transport is not None:
                self._transport.close()
