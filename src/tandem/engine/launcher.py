"""Fork launcher: imports the engine's packages once, then forks worker processes that start in a fraction of the time.

``ForkLauncher`` is the supervisor's side. The other side is ``python -m tandem.engine.launcher``: one thread, no
event loop, so that a fork is safe. They speak JSON, one message a packet, over a SOCK_SEQPACKET pair:

    <- {"ready": pid, "import_s": s}             or {"failed": text}, and the launcher is gone
    -> {"spawn": id, "module": m, "env": {...}}  with the descriptors for stdout and stderr beside it (SCM_RIGHTS)
    <- {"spawned": id, "pid": n}
    <- {"exited": id, "code": n}                 negative: the signal that ended it

A child runs ``module`` as ``python -m module`` would, with exactly ``env``; what it has already imported is the only
difference. (OMP_NUM_THREADS and the like that libraries read at import are the launcher's.) Lifelines: the launcher
dies with its parent, its children die with it; closing the socket kills them too.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import importlib
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import NoReturn

from tandem.errors import ConfigError, EngineFailed
from tandem.parent_death import die_with_parent

log = logging.getLogger(__name__)

_PACKET = 1 << 18
#: What a vLLM worker and its EngineCore would import. A missing one costs time, not correctness; the first is needed.
PRELOAD = {
    "vllm": (
        "vllm.v1.engine.async_llm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.worker.cpu_model_runner",
        "vllm.model_executor.models.llama",
        "vllm.v1.structured_output.backend_xgrammar",
        "vllm.distributed.kv_transfer.kv_connector.v1.nixl",
        "nixl._api",
        "tandem.engine.vllm_core",
        "tandem.engine.vllm_engine",
    ),
    "none": (),
}
_forked = False


def is_forked() -> bool:
    """Whether this process is a launcher's child: everything is imported, so forking further is cheap and safe."""
    return _forked


# -- the supervisor's side ---------------------------------------------------------------------------------------------


class ForkLauncher:
    """Starts workers through one launcher process. Use from the main thread: the lifeline is bound to it."""

    def __init__(
        self,
        on_exit: Callable[[str, int], None],
        *,
        preload: str = "vllm",
        env: Mapping[str, str] | None = None,
        output_fd: int | None = None,
        start_timeout_s: float = 180.0,
        spawn_timeout_s: float = 30.0,
    ) -> None:
        """``on_exit(id, code)`` is called once per child, also (with -9) when the launcher itself died.

        ``env`` is the launcher's own environment (default: ours), ``output_fd`` where its own few words go.
        """
        self._on_exit = on_exit
        self._preload = preload
        self._env = dict(os.environ if env is None else env)
        self._output_fd = output_fd
        self._start_timeout_s = start_timeout_s
        self._spawn_timeout_s = spawn_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._ready: asyncio.Future[float] | None = None
        self._spawning: dict[str, asyncio.Future[int]] = {}
        self._children: dict[str, int] = {}

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> float:
        """Seconds the imports took. ConfigError when the engine's packages cannot be imported."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Popen blocks for the fork only, and asyncio's own would start a thread to watch the child.
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-m", "tandem.engine.launcher", str(theirs.fileno()), str(os.getpid()), self._preload],
                pass_fds=(theirs.fileno(),),
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=self._output_fd,
                stderr=self._output_fd,
                start_new_session=True,  # a terminal's Ctrl-C is the supervisor's to handle
            )
        ours.setblocking(False)
        self._socket = ours
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        loop.add_reader(ours, self._readable)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                return await self._ready
        except TimeoutError:
            await self.stop()
            raise EngineFailed(f"importing the engine took longer than {self._start_timeout_s:.0f} s") from None
        except BaseException:
            await self.stop()
            raise

    async def spawn(
        self, child: str, module: str, env: Mapping[str, str], stdout_fd: int, stderr_fd: int | None = None
    ) -> int:
        """Forks a worker and returns its pid. ``child`` names it in ``on_exit``. EngineFailed: the launcher is gone."""
        if self._socket is None or child in self._spawning or child in self._children:
            raise EngineFailed(f"the launcher is not running, or {child} runs already")
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._spawning[child] = future
        message = json.dumps({"spawn": child, "module": module, "env": dict(env)}).encode()
        fds = [stdout_fd, stdout_fd if stderr_fd is None else stderr_fd]
        try:
            socket.send_fds(self._socket, [message], fds)
            async with asyncio.timeout(self._spawn_timeout_s):
                return await future
        except (OSError, TimeoutError) as e:
            raise EngineFailed(f"the launcher did not start {child}: {e or 'no answer'}") from e
        finally:
            self._spawning.pop(child, None)

    async def stop(self) -> None:
        """Kills the launcher and whatever still runs under it. Stop the workers in order first."""
        self._close()
        process = self._process
        if process is None:
            return
        deadline = time.monotonic() + 5.0
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            await asyncio.sleep(0.02)

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            packet = self._socket.recv(_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            return self._lost()
        message = json.loads(packet)
        if "spawned" in message:
            self._children[message["spawned"]] = message["pid"]
            future = self._spawning.get(message["spawned"])
            if future is not None and not future.done():
                future.set_result(message["pid"])
        elif "exited" in message:
            self._children.pop(message["exited"], None)
            self._on_exit(message["exited"], message["code"])
        elif self._ready is not None and not self._ready.done():
            if "ready" in message:
                self._ready.set_result(message["import_s"])
            else:
                self._ready.set_exception(ConfigError(f"The engine cannot be imported: {message['failed']}"))

    def _lost(self) -> None:
        """The launcher is gone, and with it all its children."""
        self._close()
        error = EngineFailed("the engine launcher died")
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)
        for future in self._spawning.values():
            if not future.done():
                future.set_exception(error)
        children, self._children = self._children, {}
        for child in children:
            self._on_exit(child, -signal.SIGKILL)

    def _close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None


# -- the launcher process ----------------------------------------------------------------------------------------------


def main() -> NoReturn:
    fd, parent_pid, preload = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    die_with_parent(parent_pid)
    channel = socket.socket(fileno=fd)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; two engines' threads would fight
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # that there is none, on a CPU
    began = time.monotonic()
    try:
        _import_all(PRELOAD[preload])
    except ImportError as e:
        _tell(channel, {"failed": str(e)})
        sys.exit(1)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        print(f"launcher: {threads} threads run after the imports; forks may not be safe", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()  # the collector would otherwise write to, and so copy, every page that the children share
    _tell(channel, {"ready": os.getpid(), "import_s": round(time.monotonic() - began, 3)})
    _serve(channel)


def _tell(channel: socket.socket, message: dict[str, object]) -> None:
    """To the supervisor. One that is gone ends this process, and that the workers."""
    try:
        channel.send(json.dumps(message).encode())
    except ConnectionError:
        os._exit(0)


def _import_all(names: tuple[str, ...]) -> None:
    for i, name in enumerate(names):
        try:
            importlib.import_module(name)
        except ImportError as e:
            if i == 0:
                raise
            print(f"launcher: {name} not imported in advance: {e}", file=sys.stderr, flush=True)


def _serve(channel: socket.socket) -> NoReturn:
    children: dict[int, tuple[str, int]] = {}  # pidfd -> (id, pid)
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd != channel.fileno():
                child, pid = children.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                _, status = os.waitpid(pid, 0)
                _tell(channel, {"exited": child, "code": os.waitstatus_to_exitcode(status)})
                continue
            packet, fds, _, _ = socket.recv_fds(channel, _PACKET, 2)
            if not packet:  # the supervisor closed it
                for _, pid in children.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            message = json.loads(packet)
            launcher_pid = os.getpid()
            pid = os.fork()
            if pid == 0:
                selector.close()
                for inherited in (channel.detach(), *children):
                    os.close(inherited)
                _run_child(message["module"], message["env"], fds, launcher_pid)
            for received in fds:
                os.close(received)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (message["spawn"], pid)
            selector.register(pidfd, selectors.EVENT_READ)
            _tell(channel, {"spawned": message["spawn"], "pid": pid})


def _run_child(module: str, env: dict[str, str], fds: list[int], launcher_pid: int) -> NoReturn:
    """In the fork: become ``python -m module``. Never returns, whatever happens."""
    code = 1
    try:
        die_with_parent(launcher_pid)
        # This file runs as __main__; the module under which the engine asks is another object.
        from tandem.engine import launcher

        launcher._forked = True
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        for fd in fds:
            os.close(fd)
        os.environ.clear()
        os.environ.update(env)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        code = _run_module(module)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_module(module: str) -> int:
    """Runs it to its end, with the interpreter's own last steps; the status that ``python -m`` would have."""
    code = 0
    sys.argv = [module]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as e:
        if isinstance(e.code, int) or e.code is None:
            code = e.code or 0
        else:
            print(e.code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for non-daemon threads, as an ending interpreter does
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    main()
