"""Calls to Redis with a deadline each and one kind of failure, over redis-py; what every request costs: over
redis_pipe.py.

Whatever keeps Redis from answering - away, restarting, too slow, refusing - is StoreUnavailable; the next call tries
anew. Any other error reply is a defect of ours: InternalError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis.exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tandem.adapters.redis_pipe import RedisPipe, Tell
from tandem.adapters.redis_script import Argument, Script
from tandem.errors import ConfigError, InternalError, StoreUnavailable

__all__ = ["Argument", "RedisClient", "Script", "connect"]

_MAX_CONNECTIONS = 16
#: Of the error replies, those that say that the server cannot serve now.
_AWAY = (
    redis_errors.ConnectionError,  # BUSYLOADING, MAXCLIENTS and authentication among them
    redis_errors.TimeoutError,
    redis_errors.ReadOnlyError,
    redis_errors.OutOfMemoryError,
    redis_errors.NoPermissionError,
    redis_errors.TryAgainError,
    redis_errors.ClusterDownError,
    redis_errors.MasterDownError,
    OSError,
    TimeoutError,
)


class RedisClient:
    """Made by ``connect``."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        try:
            # A call holds a connection until its reply is there; more calls than connections wait their turn.
            # One attempt more, at once: a connection of the pool may have died with an earlier server.
            # RESP2: replies come in one shape from every server, and no invalidation or maintenance pushes.
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=None,
                protocol=2,
                socket_connect_timeout=timeout_s,
                socket_timeout=None,
                retry=Retry(NoBackoff(), 1, supported_errors=(redis_errors.ConnectionError,)),
            )
            self._redis = Redis.from_pool(pool)
            self._pipe = RedisPipe(url, timeout_s=timeout_s)
        except ValueError as error:
            raise ConfigError(f"not a Redis URL: {error}", param="url") from None
        self._timeout_s = timeout_s
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False

    async def run(self, script: Script, keys: Sequence[str], *args: Argument) -> Any:
        """One round trip, two when the server does not know the script yet (it was started anew)."""
        try:
            return await self._call(script.name, "EVALSHA", script.sha, len(keys), *keys, *args)
        except redis_errors.NoScriptError:
            return await self._call(script.name, "EVAL", script.source, len(keys), *keys, *args)

    async def run_piped(self, script: Script, keys: Sequence[str], calls: Sequence[Sequence[Argument]]) -> list[Any]:
        """As ``run``, once with each of ``calls`` as its arguments, at a fraction of the CPU: over a connection for
        short calls only, which many share at a time."""
        return await self._pipe.run(script, keys, calls)

    def ask_piped(self, script: Script, keys: Sequence[str], calls: Sequence[Sequence[Argument]], tell: Tell) -> None:
        """As ``run_piped``, for a callback in the place of a task that waits."""
        self._pipe.ask(script, keys, calls, tell)

    async def call(self, *command: Argument) -> Any:
        return await self._call(str(command[0]), *command)

    async def _call(self, what: str, *command: Argument) -> Any:
        with self._translated(what):
            if self._closed:
                raise StoreUnavailable("the connection to Redis is closed")
            async with asyncio.timeout(self._timeout_s):
                reply: Awaitable[Any] = self._redis.execute_command(*command)  # type: ignore[no-untyped-call]
                return await reply

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """The one place where redis-py's errors become ours."""
        try:
            yield
        except redis_errors.NoScriptError:
            raise
        except TimeoutError:
            raise StoreUnavailable(f"Redis did not answer within {self._timeout_s:g} s") from None
        except _AWAY as error:
            raise StoreUnavailable(f"Redis is not reachable: {error}") from None
        except redis_errors.RedisError as error:
            if str(error).startswith(("BUSY", "MISCONF", "NOREPLICAS", "NOAUTH", "WRONGPASS")):
                raise StoreUnavailable(f"Redis refuses {what}: {error}") from None
            raise InternalError(f"Redis refuses {what}: {error}") from error

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` beside the calls, at the latest until ``aclose``."""
        task = asyncio.create_task(work, name="redis-background")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def aclose(self) -> None:
        self._closed = True
        self._pipe.close()
        tasks = [*self._background]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with self._translated("close"):
            await self._redis.aclose()


async def connect(url: str, *, timeout_s: float = 1.0) -> RedisClient:
    """Connected and answering. ``url``: redis://, rediss:// or unix://. ConfigError for a malformed URL,
    StoreUnavailable when there is nobody."""
    client = RedisClient(url, timeout_s=timeout_s)
    try:
        await client.call("PING")
    except BaseException:
        await client.aclose()
        raise
    return client
