"""Keeps a set of processes running: starts them, tells when each is ready, restarts what dies, takes all of it down.

    add(spec)                 start it, and keep it running
    wait_ready(names)         until each of them is ready; StartFailed if one does not get there
    wait_failed()             for ever, or until one has to be given up
    remove(name)              its stop signal (SIGTERM), its grace, SIGKILL
    stop(stages)              the same for all, stage by stage
    kill_all()                at once, from a second Ctrl-C

What happens after an exit is decided by a pure function, ``RestartPolicy.after_exit``. A process that has been ready
once is restarted for ever, with back-off: the rest of the cluster serves on meanwhile. One that never gets ready ends
the whole attempt, with its last lines as the reason. One that hands over (``ProcessSpec.hands_over``) is succeeded at
once when it leaves, and finishes what it has beside its successor.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tandem.adapters import notify
from tandem.adapters.clock import monotonic
from tandem.adapters.processes import Launch, OutputPipe, Process
from tandem.errors import StartFailed

#: A service that ends with this status has understood that its configuration is wrong: trying again changes nothing.
EXIT_CONFIG = 2
#: As a shell says it: there was nothing to execute.
EXIT_NOT_LAUNCHED = 127
_TAIL_LINES = 20
_FIRST_POLL_S, _LONGEST_POLL_S = 0.02, 0.25
#: After SIGKILL the kernel needs a moment; more than this would be a process stuck in the kernel.
_KILL_WAIT_S = 10.0
_LAST_OUTPUT_S = 0.5
#: A process that is not even launched yet has nothing to put in order.
_UNLAUNCHED_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Restart:
    after_s: float
    failures: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    first_s: float = 0.2
    factor: float = 2.0
    longest_s: float = 10.0
    #: Ready for this long: what went wrong before no longer counts.
    healthy_s: float = 30.0
    #: Exits before it has ever been ready that end the attempt.
    start_attempts: int = 3

    def after_exit(self, *, status: int, failures: int, ever_ready: bool, ready_for_s: float) -> Restart | GiveUp:
        """``failures`` = exits in a row so far, this one not counted."""
        failures = 1 if ready_for_s >= self.healthy_s else failures + 1
        if not ever_ready and status == EXIT_CONFIG:
            return GiveUp("refused its configuration")
        if not ever_ready and failures >= self.start_attempts:
            return GiveUp(f"failed to start {failures} times, last with {describe_status(status)}")
        # The exponent is bounded so that a process that has failed for days does not overflow a float.
        return Restart(min(self.longest_s, self.first_s * self.factor ** min(failures - 1, 64)), failures)


def describe_status(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting to restart"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True)
class ProcessSpec:
    """What to run. ``ready`` makes one quick attempt and never raises for a process that is not there yet."""

    name: str
    launch: Launch
    env: Mapping[str, str]
    ready: Callable[[], Awaitable[bool]]
    #: Not ready after this long counts as a failed start.
    start_timeout_s: float = 60.0
    #: How it is told to leave once it is ready; before that, by SIGTERM.
    stop_signal: signal.Signals = signal.SIGTERM
    #: From then to SIGKILL.
    grace_s: float = 10.0
    #: It says (notify.stopping) when it has given up its ports while it still has something to finish.
    hands_over: bool = False


@dataclass
class Child:
    """One supervised process as it is now. Only the supervisor writes it."""

    spec: ProcessSpec
    state: State = State.STARTING
    pid: int = 0
    #: Times it was started again.
    restarts: int = 0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    process: Process | None = None
    #: Those that have given up their place and finish what they have.
    predecessors: dict[Process, asyncio.Task[None]] = field(default_factory=dict)
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    #: Set for good when it is ready for the first time.
    readied: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """See the module docstring. All calls on one event loop, in the main thread (parent_death says why)."""

    def __init__(
        self,
        *,
        on_line: Callable[[str, str], None],
        on_news: Callable[[Child, str], None],
        policy: RestartPolicy | None = None,
    ) -> None:
        """``on_line(name, line)`` gets all output; ``on_news(child, what)`` every change, in words."""
        self._on_line = on_line
        self._on_news = on_news
        self._policy = policy or RestartPolicy()
        self._children: dict[str, Child] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failed = asyncio.Event()
        self._failure: BaseException | None = None
        self._ear: notify.Ear | None = None
        #: By pid of those that run: it leaves.
        self._stopping: dict[int, asyncio.Event] = {}

    @property
    def children(self) -> Mapping[str, Child]:
        return self._children

    def add(self, spec: ProcessSpec) -> Child:
        if spec.name in self._children:
            raise ValueError(f"{spec.name} is supervised already")
        child = self._children[spec.name] = Child(spec)
        task = self._tasks[spec.name] = asyncio.create_task(self._keep(child), name=f"supervise {spec.name}")
        task.add_done_callback(self._task_ended)
        return child

    async def wait_ready(self, names: Iterable[str]) -> None:
        """Each process ready once. StartFailed as soon as any process of the cluster is given up."""
        for name in names:
            await self._first(self._children[name].readied.wait(), self._failed.wait())
            self._raise_failure()

    async def wait_failed(self) -> None:
        """Returns never; raises StartFailed when a process is given up."""
        await self._failed.wait()
        self._raise_failure()

    async def remove(self, name: str) -> None:
        """Ends it and forgets it. Not known: no-op."""
        child = self._children.get(name)
        if child is None:
            return
        await self._end(child)
        await asyncio.wait({self._tasks.pop(name)})
        del self._children[name]

    async def stop(self, stages: Sequence[Iterable[str]]) -> None:
        """Ends all processes, one stage after the other, each stage at once; then what no stage names."""
        named = [[n for n in stage if n in self._children] for stage in stages]
        rest = [n for n in self._children if not any(n in stage for stage in named)]
        for stage in (*named, rest):
            await asyncio.gather(*(self.remove(name) for name in stage))
        if self._ear is not None:
            self._ear.close()
            self._ear = None

    def kill_all(self) -> None:
        """SIGKILL to everything, without waiting; ``stop`` then returns soon."""
        for child in self._children.values():
            child.leave.set()
            for process in _processes(child):
                process.kill()

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and self._failure is None:
            self._failure = error
            self._failed.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    @staticmethod
    async def _first(*waits: Awaitable[object]) -> None:
        tasks = {asyncio.ensure_future(wait) for wait in waits}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _keep(self, child: Child) -> None:
        """Runs the process again and again until it is to leave, or has to be given up."""
        failures = 0
        while not child.leave.is_set():
            pipe = OutputPipe(lambda line: self._line(child, line))
            try:
                ended = await self._run_once(child, pipe)
            except StartFailed as error:
                self._line(child, error.message)
                ended = EXIT_NOT_LAUNCHED, 0.0
            if ended is None:
                child.restarts += 1
                continue
            status, ready_for_s = ended
            await pipe.close(within_s=_LAST_OUTPUT_S)
            if child.leave.is_set():
                break
            verdict = self._policy.after_exit(
                status=status, failures=failures, ever_ready=child.readied.is_set(), ready_for_s=ready_for_s
            )
            if isinstance(verdict, GiveUp):
                self._set(child, State.STOPPED, verdict.reason)
                raise StartFailed("\n".join([f"{child.spec.name} {verdict.reason}", *child.tail]))
            failures = verdict.failures
            self._set(
                child, State.WAITING, f"ended with {describe_status(status)}; starts again in {verdict.after_s:g} s"
            )
            await self._pause(child, verdict.after_s)
            child.restarts += 1
        self._set(child, State.STOPPED, "stopped")

    async def _run_once(self, child: Child, pipe: OutputPipe) -> tuple[int, float] | None:
        """Exit status, and for how many seconds it was ready. None = it finishes elsewhere, and its place is free."""
        spec = child.spec
        child.tail.clear()
        output_fd = await pipe.open()
        try:
            process = await spec.launch(spec.name, self._environment(spec), output_fd)
        finally:
            os.close(output_fd)
        stopping = self._stopping[process.pid] = asyncio.Event()
        child.process, child.pid = process, process.pid
        self._set(child, State.STARTING, f"started, pid {process.pid}")
        exited = asyncio.create_task(process.wait(), name=f"wait for {spec.name}")
        try:
            if child.leave.is_set():  # told to leave while it was being launched
                process.send_signal(signal.SIGTERM)
            ready_at = monotonic() if await self._gets_ready(child, process, exited) else None
            if ready_at is not None and not child.leave.is_set():
                child.readied.set()
                self._set(child, State.READY, "ready")
            await self._first(asyncio.shield(exited), stopping.wait())
            if not exited.done() and not child.leave.is_set():
                self._set(child, State.WAITING, "leaves; its successor starts")
                seen_out = asyncio.create_task(self._see_out(child, process, exited, pipe))
                child.predecessors[process] = seen_out
                return None
            return await exited, 0.0 if ready_at is None else monotonic() - ready_at
        finally:
            del self._stopping[process.pid]
            if process not in child.predecessors:
                process.kill()  # what it started and left behind
                exited.cancel()
            child.process, child.pid = None, 0

    def _environment(self, spec: ProcessSpec) -> Mapping[str, str]:
        if not spec.hands_over:
            return spec.env
        if self._ear is None:
            self._ear = notify.Ear(self._on_stopping)
        return {**spec.env, notify.VARIABLE: self._ear.address}

    def _on_stopping(self, pid: int) -> None:
        if pid in self._stopping:
            self._stopping[pid].set()

    async def _see_out(self, child: Child, process: Process, exited: asyncio.Task[int], pipe: OutputPipe) -> None:
        try:
            status = await exited
            await pipe.close(within_s=_LAST_OUTPUT_S)
            self._on_news(child, f"ended with {describe_status(status)}")
        finally:
            process.kill()
            exited.cancel()
            del child.predecessors[process]

    async def _gets_ready(self, child: Child, process: Process, exited: asyncio.Task[int]) -> bool:
        deadline = monotonic() + child.spec.start_timeout_s
        poll_s = _FIRST_POLL_S
        while not exited.done() and not child.leave.is_set():
            if await child.spec.ready():
                return not exited.done()
            if monotonic() > deadline:
                self._line(child, f"(not ready after {child.spec.start_timeout_s:g} s: killed)")
                process.kill()
                return False
            await asyncio.wait({exited}, timeout=poll_s)
            poll_s = min(_LONGEST_POLL_S, poll_s * 1.3)
        return False

    async def _end(self, child: Child) -> None:
        """Its stop signal, the grace, SIGKILL. Returns when the process is gone."""
        child.leave.set()
        process, task = child.process, self._tasks[child.spec.name]
        for predecessor in child.predecessors:
            predecessor.send_signal(child.spec.stop_signal)
        if process is not None:
            number = child.spec.stop_signal if child.state is State.READY else signal.SIGTERM
            self._set(child, State.STOPPING, "stopping")
            process.send_signal(number)
        ending = {task, *child.predecessors.values()}
        await asyncio.wait(ending, timeout=child.spec.grace_s if _processes(child) else _UNLAUNCHED_GRACE_S)
        if left := _processes(child):
            self._on_news(child, f"did not leave within {child.spec.grace_s:g} s: killed")
            for process in left:
                process.kill()
            await asyncio.wait(ending, timeout=_KILL_WAIT_S)
        for waiting in ending:
            waiting.cancel()

    async def _pause(self, child: Child, seconds: float) -> None:
        try:
            await asyncio.wait_for(child.leave.wait(), seconds)
        except TimeoutError:
            return

    def _line(self, child: Child, line: str) -> None:
        child.tail.append(line)
        self._on_line(child.spec.name, line)

    def _set(self, child: Child, state: State, news: str) -> None:
        child.state = state
        self._on_news(child, news)


def _processes(child: Child) -> list[Process]:
    """All that run."""
    return [*child.predecessors, *([child.process] if child.process is not None else [])]
