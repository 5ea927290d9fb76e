"""Scripts over one Redis connection, pipelined: what a turn of the event loop asks leaves in one write.

For what every request costs, the router's look-up and the workers' updates: no pool, lock, task or timer per call, and
hiredis reads the replies, which takes a third to a fifth of redis-py's CPU (docs/decisions/library-clients.md). Calls
are answered in their order; when the first of them is not within ``timeout_s``, all that wait fail with
StoreUnavailable and the connection is given up. The next call makes a new one: one attempt for all who wait, and none
for a moment after one that nobody answered or whose login was refused.

``ask`` tells a callback straight from the socket's; ``run`` awaits the same. Who asks has gathered what a turn brings,
and is written for at once: the loop would first look at all other sockets.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import hiredis
from redis.asyncio.connection import parse_url

from tandem.adapters.clock import monotonic
from tandem.adapters.redis_script import Argument, Script
from tandem.errors import InternalError, StoreUnavailable, TandemError

#: After an attempt to connect that nobody answered, or whose login was refused, calls fail like it for so long.
_PAUSE_S = 0.5
#: Its stub knows commands of one word only.
_pack: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]
#: Beginnings of error replies of a server that cannot serve now.
_AWAY = ("LOADING", "BUSY", "MISCONF", "NOREPLICAS", "NOAUTH", "WRONGPASS", "READONLY", "OOM", "NOPERM", "TRYAGAIN",
         "CLUSTERDOWN", "MASTERDOWN", "ERR max number of clients")  # fmt: skip


#: Gets the answers, one for each call, or why there are none.
Tell = Callable[[list[Any] | TandemError], None]


class RedisPipe:
    """``url``: as redis-py understands it, and not checked again here."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._options: dict[str, Any] = dict(parse_url(url))
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._connection: _Connection | None = None
        self._attempt: asyncio.Task[_Connection] | None = None
        self._failure = ""
        self._paused_until = 0.0
        self._closed = False

    async def run(self, script: Script, keys: Sequence[str], calls: Sequence[Sequence[Argument]]) -> list[Any]:
        """The script's answers to each of ``calls``, its arguments. One round trip for all, two when the server does
        not know the script yet (it was started anew)."""
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        self._ask(script, keys, calls, partial(_settle, answer))
        return await answer

    def ask(self, script: Script, keys: Sequence[str], calls: Sequence[Sequence[Argument]], tell: Tell) -> None:
        """As ``run``, with a callback in the place of a task that waits; it is called later, never from in here."""
        self._ask(script, keys, calls, tell)
        if self._connection is not None:
            self._connection.write()

    def _ask(self, script: Script, keys: Sequence[str], calls: Sequence[Sequence[Argument]], tell: Tell) -> None:
        connection = self._connection
        if connection is not None and not connection.lost:
            return self._ask_over(connection, script, keys, calls, tell)
        try:
            attempt = self._connecting()
        except StoreUnavailable as error:
            self._loop.call_soon(tell, error)
            return None

        def connected(attempt: asyncio.Task[_Connection]) -> None:
            if attempt.cancelled():
                tell(StoreUnavailable("the connection to Redis is closed"))
            elif (error := attempt.exception()) is None:
                self._ask_over(attempt.result(), script, keys, calls, tell)
            else:
                tell(error if isinstance(error, TandemError) else InternalError(f"connecting to Redis: {error!r}"))

        attempt.add_done_callback(connected)
        return None

    def _ask_over(
        self,
        connection: _Connection,
        script: Script,
        keys: Sequence[str],
        calls: Sequence[Sequence[Argument]],
        tell: Tell,
    ) -> None:
        def answered(replies: list[Any] | TandemError) -> None:
            if isinstance(replies, TandemError):
                return tell(replies)
            unknown = [i for i, reply in enumerate(replies) if type(reply) is hiredis.ReplyError and _is_unknown(reply)]
            if not unknown:
                return tell(_checked_all(replies, script.name))

            def answered_again(again: list[Any] | TandemError) -> None:
                if isinstance(again, TandemError):
                    return tell(again)
                for i, reply in zip(unknown, again, strict=True):
                    replies[i] = reply
                return tell(_checked_all(replies, script.name))

            again = [_pack(("EVAL", script.source, len(keys), *keys, *calls[i])) for i in unknown]
            return connection.ask(again, answered_again)

        connection.ask([_pack(("EVALSHA", script.sha, len(keys), *keys, *args)) for args in calls], answered)

    def _connecting(self) -> asyncio.Task[_Connection]:
        """One attempt for all who ask. StoreUnavailable at once when there is to be none now."""
        if self._closed:
            raise StoreUnavailable("the connection to Redis is closed")
        if self._attempt is None:
            if monotonic() < self._paused_until:
                raise StoreUnavailable(self._failure)
            self._attempt = self._loop.create_task(self._try_to_connect(), name="redis-connect")
        return self._attempt

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
        loop, options = self._loop, self._options
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
                await connection.call("AUTH", *([user] if user else []), password)
            if database:
                await connection.call("SELECT", database)
        except BaseException:
            connection.give_up("login failed")
            raise
        return connection

    def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            self._connection.give_up("closed")


class _Asked:
    """Commands that were asked together, and the replies so far."""

    __slots__ = ("asked_s", "missing", "replies", "tell")

    def __init__(self, missing: int, asked_s: float, tell: Tell) -> None:
        self.missing = missing
        self.asked_s = asked_s
        self.tell = tell
        self.replies: list[Any] = []


class _Connection(asyncio.Protocol):
    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[_Asked] = deque()
        self._out: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    async def call(self, *command: Argument) -> Any:
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        self.ask([_pack(command)], partial(_settle, answer))
        return _checked((await answer)[0], str(command[0]))

    def ask(self, commands: list[bytes], tell: Tell) -> None:
        """Raw replies, errors of the server among them."""
        if not commands:
            self._loop.call_soon(tell, [])
            return
        if self.lost:
            self._loop.call_soon(tell, StoreUnavailable("the connection to Redis is lost"))
            return
        if not self._out:
            self._loop.call_soon(self.write)
        self._out += commands
        self._waiting.append(_Asked(len(commands), monotonic(), tell))
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._look)

    def write(self) -> None:
        """What has been asked, unless it is written already."""
        commands, self._out = self._out, []
        if commands and self._transport is not None and not self.lost:
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
            asked = self._waiting[0]
            asked.replies.append(reply)
            asked.missing -= 1
            if not asked.missing:
                self._waiting.popleft()
                self._tell(asked, asked.replies)

    def _tell(self, asked: _Asked, replies: list[Any] | TandemError) -> None:
        try:
            asked.tell(replies)
        except Exception as error:  # one asker's defect must not take the connection from the others
            self._loop.call_exception_handler({"message": "a callback of RedisPipe failed", "exception": error})

    def _look(self) -> None:
        """One timer for all: whoever waits longest is in front."""
        self._watch = None
        if not self._waiting:
            return
        left = self._waiting[0].asked_s + self._timeout_s - monotonic()
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
            self._tell(self._waiting.popleft(), StoreUnavailable(reason))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost:
            self.give_up(f"Redis is not reachable: {exc or 'closed by the server'}")


def _settle(answer: asyncio.Future[list[Any]], replies: list[Any] | TandemError) -> None:
    if answer.done():  # nobody waits for it any more
        return
    if isinstance(replies, TandemError):
        answer.set_exception(replies)
    else:
        answer.set_result(replies)


def _is_unknown(reply: hiredis.ReplyError) -> bool:
    return str(reply).startswith("NOSCRIPT")


def _checked(reply: Any, what: str) -> Any:
    if not isinstance(reply, hiredis.ReplyError):
        return reply
    if str(reply).startswith(_AWAY):
        raise StoreUnavailable(f"Redis refuses {what}: {reply}")
    raise InternalError(f"Redis refuses {what}: {reply}")


def _checked_all(replies: list[Any], what: str) -> list[Any] | TandemError:
    try:
        return [_checked(reply, what) for reply in replies]
    except TandemError as error:
        return error


def _tls(options: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"))
    if options.get("ssl_cert_reqs") == "none" or options.get("ssl_check_hostname") is False:
        context.check_hostname = False
    if options.get("ssl_cert_reqs") == "none":
        context.verify_mode = ssl.CERT_NONE
    if options.get("ssl_certfile"):
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"))
    return context
