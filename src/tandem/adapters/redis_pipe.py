"""Scripts over one Redis connection, pipelined: what a turn of the event loop asks leaves in one write.

For what every request costs, the router's look-up and the workers' updates: no pool, lock, task or timer per call, and
hiredis reads the replies, which takes a third to a fifth of redis-py's CPU (docs/decisions/library-clients.md). Calls
are answered in their order; when the first of them is not within ``timeout_s``, all that wait fail with
StoreUnavailable and the connection is given up. The next call makes a new one: one attempt for all who wait, and none
for a moment after one that nobody answered or whose login was refused.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import hiredis
from redis.asyncio.connection import parse_url

from tandem.adapters.clock import monotonic
from tandem.adapters.redis_script import Argument, Script
from tandem.errors import InternalError, StoreUnavailable

#: After an attempt to connect that nobody answered, or whose login was refused, calls fail like it for so long.
_PAUSE_S = 0.5
#: Its stub knows commands of one word only.
_pack: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]
#: Beginnings of error replies of a server that cannot serve now.
_AWAY = ("LOADING", "BUSY", "MISCONF", "NOREPLICAS", "NOAUTH", "WRONGPASS", "READONLY", "OOM", "NOPERM", "TRYAGAIN",
         "CLUSTERDOWN", "MASTERDOWN", "ERR max number of clients")  # fmt: skip


class RedisPipe:
    """``url``: as redis-py understands it, and not checked again here."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._options: dict[str, Any] = dict(parse_url(url))
        self._timeout_s = timeout_s
        self._connection: _Connection | None = None
        self._attempt: asyncio.Task[_Connection] | None = None
        self._failure = ""
        self._paused_until = 0.0
        self._closed = False

    async def run(self, script: Script, keys: Sequence[str], calls: Sequence[Sequence[Argument]]) -> list[Any]:
        """The script's answers to each of ``calls``, its arguments. One round trip for all, two when the server does
        not know the script yet (it was started anew)."""
        replies = await self._ask([("EVALSHA", script.sha, len(keys), *keys, *args) for args in calls])
        unknown = [i for i, reply in enumerate(replies) if type(reply) is hiredis.ReplyError and _is_unknown(reply)]
        if unknown:
            again = await self._ask([("EVAL", script.source, len(keys), *keys, *calls[i]) for i in unknown])
            for i, reply in zip(unknown, again, strict=True):
                replies[i] = reply
        return [_checked(reply, script.name) for reply in replies]

    async def _ask(self, commands: Sequence[tuple[Argument, ...]]) -> list[Any]:
        connection = self._connection
        if connection is None or connection.lost:
            connection = await self._connect()
        answers = [connection.ask(_pack(command)) for command in commands]
        try:
            return [await answer for answer in answers]
        except BaseException:
            for answer in answers:  # the others have failed with it, or nobody waits for them
                if not answer.cancel() and not answer.cancelled():
                    answer.exception()
            raise

    async def _connect(self) -> _Connection:
        if self._closed:
            raise StoreUnavailable("the connection to Redis is closed")
        if self._attempt is None:
            if monotonic() < self._paused_until:
                raise StoreUnavailable(self._failure)
            self._attempt = asyncio.create_task(self._try_to_connect(), name="redis-connect")
        return await asyncio.shield(self._attempt)  # one who leaves takes it from nobody else

    async def _try_to_connect(self) -> _Connection:
        pause_s = _PAUSE_S
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._open()
        except TimeoutError:
            self._failure = f"Redis did not answer within {self._timeout_s:g} s"
        except OSError as error:
            self._failure = f"Redis is not reachable: {error}"
            pause_s = 0.0  # that nobody listens is known at once, and so is that somebody does again
        except StoreUnavailable as error:
            self._failure = error.message
        else:
            if not self._closed:
                self._connection = connection
                return connection
            connection.give_up("closed")
            self._failure = "the connection to Redis is closed"
        finally:
            self._attempt = None
        self._paused_until = monotonic() + pause_s
        raise StoreUnavailable(self._failure)

    async def _open(self) -> _Connection:
        loop, options = asyncio.get_running_loop(), self._options
        timeout_s = self._timeout_s

        def make() -> _Connection:
            return _Connection(loop, timeout_s)

        if "path" in options:
            _, connection = await loop.create_unix_connection(make, options["path"])
        else:
            host, port = options.get("host", "localhost"), options.get("port", 6379)
            context = _tls(options) if "SSL" in options.get("connection_class", object).__name__ else None
            _, connection = await loop.create_connection(make, host, port, ssl=context)
        user, password, database = options.get("username"), options.get("password"), options.get("db", 0)
        try:
            if password:
                login = ("AUTH", user, password) if user else ("AUTH", password)
                _checked(await connection.ask(_pack(login)), "AUTH")
            if database:
                _checked(await connection.ask(_pack(("SELECT", database))), "SELECT")
        except BaseException:
            connection.give_up("login failed")
            raise
        return connection

    def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            self._connection.give_up("closed")


class _Connection(asyncio.Protocol):
    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()  # and when it was asked
        self._out: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def ask(self, command: bytes) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = self._loop.create_future()
        if not self._out:
            self._loop.call_soon(self._write)
        self._out.append(command)
        self._waiting.append((answer, monotonic()))
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._look)
        return answer

    def _write(self) -> None:
        commands, self._out = self._out, []
        if self._transport is not None and not self.lost:
            self._transport.write(b"".join(commands))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while self._waiting:
            try:
                reply = self._reader.gets()
            except hiredis.ProtocolError as error:
                self.give_up(str(error))
                return
            if reply is False:
                return
            answer, _ = self._waiting.popleft()
            if not answer.done():  # else nobody waits for it any more
                answer.set_result(reply)

    def _look(self) -> None:
        """One timer for all: whoever waits longest is in front."""
        self._watch = None
        if not self._waiting:
            return
        left = self._waiting[0][1] + self._timeout_s - monotonic()
        if left <= 0:
            self.give_up(f"Redis did not answer within {self._timeout_s:g} s")
        else:
            self._watch = self._loop.call_later(left, self._look)

    def give_up(self, reason: str) -> None:
        self.lost = True
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._transport is not None:
            self._transport.abort()
        while self._waiting:
            answer, _ = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(StoreUnavailable(reason))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost:
            self.give_up(f"Redis is not reachable: {exc or 'closed by the server'}")


def _is_unknown(reply: hiredis.ReplyError) -> bool:
    return str(reply).startswith("NOSCRIPT")


def _checked(reply: Any, what: str) -> Any:
    if not isinstance(reply, hiredis.ReplyError):
        return reply
    if str(reply).startswith(_AWAY):
        raise StoreUnavailable(f"Redis refuses {what}: {reply}")
    raise InternalError(f"Redis refuses {what}: {reply}")


def _tls(options: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"))
    if options.get("ssl_cert_reqs") == "none" or options.get("ssl_check_hostname") is False:
        context.check_hostname = False
    if options.get("ssl_cert_reqs") == "none":
        context.verify_mode = ssl.CERT_NONE
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    return context
