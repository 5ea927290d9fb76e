"""Workers forked from one process that has imported vLLM already, behind the supervisor's ``Launch`` port.

The import takes about ten seconds and then serves all workers: ``begin`` starts it early, beside everything else.
A launcher that died, and its workers with it, is started again by the first worker that comes back.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping

from tandem.adapters.processes import Launch, OutputPipe, Process
from tandem.engine.launcher import ForkLauncher
from tandem.errors import EngineFailed, StartFailed

#: vLLM and what it brings say a hundred lines at each start, of which none is for people who start a cluster. Errors
#: stay. Whatever of this the user's environment sets wins.
QUIET_ENGINE = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "NIXL_LOG_LEVEL": "WARN",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
}


class _ForkedProcess:
    def __init__(self, pid: int, exited: asyncio.Future[int]) -> None:
        self._pid = pid
        self._exited = exited

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> int:
        return await asyncio.shield(self._exited)

    def send_signal(self, number: signal.Signals) -> None:
        if not self._exited.done():
            try:
                os.kill(self._pid, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        # Its engine's process dies with it: the engine sees to that.
        self.send_signal(signal.SIGKILL)


class ForkedWorkers:
    """Owns the launcher process."""

    def __init__(self, *, env: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        self._env = env
        self._on_line = on_line
        self._launcher: asyncio.Task[ForkLauncher] | None = None
        self._exits: dict[str, asyncio.Future[int]] = {}

    def begin(self) -> None:
        """Starts the launcher's imports, if they have not been started."""
        if self._launcher is None:
            self._launcher = asyncio.create_task(self._start(), name="start the engine launcher")

    def runs(self, module: str) -> Launch:
        """Launches ``python -m module`` as a fork."""

        async def launch(name: str, env: Mapping[str, str], output_fd: int) -> Process:
            self.begin()
            assert self._launcher is not None
            task = self._launcher
            exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            try:
                launcher = await asyncio.shield(task)
                self._exits[name] = exited
                pid = await launcher.spawn(name, module, env, output_fd)
            except EngineFailed as error:
                if self._launcher is task:  # the next attempt brings up a new one
                    self._launcher = None
                raise StartFailed(f"{name}: {error.message}") from error
            return _ForkedProcess(pid, exited)

        return launch

    async def close(self) -> None:
        """Takes the launcher down, and with it what still runs under it."""
        task, self._launcher = self._launcher, None
        if task is None:
            return
        if not task.done():
            task.cancel()  # the launcher takes itself down on the way out
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            await task.result().stop()

    async def _start(self) -> ForkLauncher:
        pipe = OutputPipe(self._on_line)
        output_fd = await pipe.open()
        launcher = ForkLauncher(self._exited, env=self._env, output_fd=output_fd)
        try:
            await launcher.start()
        finally:
            os.close(output_fd)
        return launcher

    def _exited(self, name: str, status: int) -> None:
        future = self._exits.pop(name, None)
        if future is not None and not future.done():
            future.set_result(status)
