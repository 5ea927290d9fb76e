"""The routes that take a body: from the request to the last byte of its answer, whatever carries the two.

``PostedRoutes.answer`` is all of it, over a ``Response`` and a ``Watch``. As ASGI it stands in front of the web app
that serves everything else; direct.py carries the same exchanges without ASGI, which costs less. Every body of a stream
carries all that was queued. The 200 of a stream opens when a worker has the request, or after ten quiet seconds, so
that a refusal has its own status; from then on an error is an event. A client that goes away ends its request, wherever
that is.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from typing import Any

from services.frontend.generation import Generation, Generations
from services.frontend.http_errors import error_body, error_headers, http_status
from services.frontend.intake import Caller, Intake
from services.frontend.line import Line
from services.frontend.openai_responses import DONE, KEEP_ALIVE, event
from services.frontend.openai_routes import AnswerForm, Exchange, Route
from tandem.adapters.clock import monotonic, new_id
from tandem.adapters.deployment import Tenant
from tandem.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    TandemError,
)

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]
#: Takes what is to be called when the client goes away; gives what ends the watch.
Watch = Callable[[Callable[[], None]], Callable[[], object]]
ReadBody = Callable[[], Awaitable[bytes]]

BODY_TIMEOUT_S = 30.0
#: A frontend that is full is alive.
PROBES = frozenset({"/healthz", "/readyz"})

_JSON = ((b"content-type", b"application/json"),)
_SSE = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Disconnected(Exception):
    """The client has gone before its request was complete."""


class PostedRoutes:
    def __init__(
        self,
        app: App,
        routes: Mapping[str, Route],
        intake: Intake,
        generations: Generations,
        *,
        crowded: Callable[[], bool] = lambda: False,
        told: Callable[[TandemError], None] = lambda error: None,
    ) -> None:
        """``crowded``: there are more connections than there may be, so that only probes are answered. ``told`` hears
        each error that a client is told of."""
        self._app = app
        self._crowded = crowded
        self.told = told
        self._routes = dict(routes)
        self.arrivals = intake.arrivals
        self._intake = intake
        self._generations = generations

    def route(self, path: str) -> Route | None:
        return self._routes.get(path)

    @property
    def max_body_bytes(self) -> int:
        return self._intake.limits.max_body_bytes

    def refused(self, headers: Mapping[bytes, bytes]) -> TandemError | None:
        """Why a request is refused whatever its body says."""
        if not self._intake.tenants.open:
            try:
                self._tenant(headers)
            except TandemError as error:
                return error
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return PayloadTooLarge(f"the body has {int(length)} bytes; the limit is {self.max_body_bytes}")
        return None

    def _tenant(self, headers: Mapping[bytes, bytes]) -> Tenant:
        return self._intake.tenants.of_authorization(headers.get(b"authorization", b"").decode("latin-1"))

    @property
    def crowded(self) -> bool:
        return self._crowded()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._crowded() and scope["path"] not in PROBES:
            await self.turn_away(_AsgiResponse(send, dict(scope["headers"]), self.told))
            return
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])

        async def read_body() -> bytes:
            if (refused := self.refused(headers)) is not None:
                raise refused
            return await _read_body(receive, self.max_body_bytes)

        response = _AsgiResponse(send, headers, self.told)
        await self.answer(route, headers, read_body, response, _watch_over(receive))

    async def turn_away(self, response: Response) -> None:
        await response.error(Overloaded("too many connections"), (b"connection", b"close"))

    def answer(
        self, route: Route, headers: Mapping[bytes, bytes], read_body: ReadBody, response: Response, watch: Watch
    ) -> Coroutine[Any, Any, None]:
        """One exchange, to its end; it counts as arriving from this call on. Raises nothing but what ``response``
        does."""
        self.arrivals.enter()
        return self._answer(route, headers, read_body, response, watch)

    async def _answer(
        self, route: Route, headers: Mapping[bytes, bytes], read_body: ReadBody, response: Response, watch: Watch
    ) -> None:
        try:
            begun = await self._begin(route, headers, read_body)
            if isinstance(begun, bytes):
                await response.whole(200, begun)
            elif not isinstance(begun, tuple):
                await response.whole(200, await _unless_disconnected(begun, watch))
            else:
                generation, form = begun
                unwatch = watch(generation.cancel)
                try:
                    await (_stream if generation.request.streaming else _whole)(generation, form, response)
                finally:
                    unwatch()
                    generation.close()
        except TandemError as error:
            await response.error(error)
        except Disconnected:
            pass
        except Exception:
            # A defect of ours. The client hears of it in the shape that it understands; the log has the rest.
            log.exception("request %s failed", response.request_id)
            await response.error(InternalError(f"internal error; request {response.request_id}"))
        response.over()

    async def _begin(
        self, route: Route, headers: Mapping[bytes, bytes], read_body: ReadBody
    ) -> bytes | Coroutine[Any, Any, bytes] | tuple[Generation, AnswerForm]:
        """What comes of a request: as its route has it, or a generation that has started, and how to say it."""
        arrivals = self.arrivals
        try:
            arrival_s = monotonic()
            traceparent = headers.get(b"traceparent")
            caller = Caller(
                tenant=self._tenant(headers),
                traceparent=traceparent.decode() if traceparent and _TRACEPARENT.fullmatch(traceparent) else "",
            )
            body = await read_body()
            received_s = monotonic()
            exchange = await route(body, caller, arrival_s)
            if not isinstance(exchange, Exchange):
                return exchange
            generation = self._generations.begin(exchange.request, received_s=received_s)
            try:
                await arrivals.next_stage()
                generation.start()
            except BaseException:
                generation.close()
                raise
            return generation, exchange.answer
        finally:
            arrivals.leave()


async def _whole(generation: Generation, form: AnswerForm, response: Response) -> None:
    body = form.whole(await generation.collect(), generation.usage)
    await generation.departures.next_stage()
    await response.whole(200, body)


async def _stream(generation: Generation, form: AnswerForm, response: Response) -> None:
    quiet = not await generation.wait_opened()
    head = form.head() + (KEEP_ALIVE if quiet else b"")
    if generation.done and generation.error is None:  # all of it came at once
        body = head + form.events(await generation.next_batch()) + form.tail(generation.usage)
        await generation.departures.next_stage()
        await response.open(_SSE, b"")
        await response.close(body)
        return
    await response.open(_SSE, head)
    offer = response.offer

    def new_line(choice: int, texts: Sequence[str | None]) -> Line | None:
        around = form.around_text(choice)
        return None if around is None else response.line(texts, around, generation.stop_relay)

    try:
        while not generation.over:
            if offer is not None:
                generation.relay(lambda deltas: offer(form.events(deltas)), new_line)
            deltas = await generation.next_batch()
            body = form.events(deltas) if deltas else KEEP_ALIVE
            if generation.over and generation.error is None:
                body += form.tail(generation.usage)
                await generation.departures.next_stage()
                await response.close(body)
            elif body:
                await response.write(body)
        if generation.error is not None:
            raise generation.error
    except TandemError as error:
        response.told(error)
        await response.close(form.failed(error))


def _watch_over(receive: Receive) -> Watch:
    def watch(gone: Callable[[], None]) -> Callable[[], object]:
        async def wait() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone()

        return asyncio.create_task(wait()).cancel

    return watch


async def _unless_disconnected(work: Coroutine[Any, Any, bytes], watch: Watch) -> bytes:
    """Raises Disconnected, with the work cancelled, when the client goes away before its end."""
    working = asyncio.create_task(work)
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        working.cancel()

    unwatch = watch(leave)
    try:
        return await working
    except asyncio.CancelledError:
        if left:
            raise Disconnected from None
        raise
    finally:
        unwatch()
        working.cancel()


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise PayloadTooLarge(f"the body has more than {limit} bytes")
                parts.append(part)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    if not size:
        raise InvalidRequest("the body is empty; a JSON object is expected")
    return parts[0] if len(parts) == 1 else b"".join(parts)


class Response:
    """The answer to one request: whole, or opened, written and closed."""

    __slots__ = ("_opened", "request_id", "told")

    def __init__(self, headers: Mapping[bytes, bytes], told: Callable[[TandemError], None]) -> None:
        self.told = told
        self._opened = False
        given = headers.get(b"x-request-id")
        self.request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else new_id()

    async def start(self, status: int, headers: tuple[Header, ...], *, length: int | None) -> None:
        """The head, with the request's id. ``length``: of the body, None = a stream."""
        raise NotImplementedError

    async def write(self, body: bytes) -> None:
        """Waits while the client's connection is full."""
        raise NotImplementedError

    async def close(self, body: bytes) -> None:
        """The last of it."""
        raise NotImplementedError

    @property
    def offer(self) -> Callable[[bytes], bool] | None:
        """``write`` for those who cannot wait; False once the client's connection is full."""
        return None

    def line(self, texts: Sequence[str | None], around: tuple[bytes, bytes], full: Callable[[], None]) -> Line | None:
        """``write`` for plain tokens, from here straight to the connection; None where that is not possible."""
        return None

    def over(self) -> None:
        """No more of it will come, if any has."""

    async def open(self, headers: tuple[Header, ...], body: bytes) -> None:
        self._opened = True
        await self.start(200, headers, length=None)
        if body:
            await self.write(body)

    async def whole(self, status: int, body: bytes, headers: Sequence[Header] = ()) -> None:
        self._opened = True
        await self.start(status, (*_JSON, *headers), length=len(body))
        await self.close(body)

    async def error(self, error: TandemError, *headers: Header) -> None:
        self.told(error)
        if self._opened:
            await self.close(event(error_body(error)) + DONE)
        elif not isinstance(error, Cancelled):  # else nobody is there to read it
            await self.whole(http_status(error), error_body(error), [*error_headers(error), *headers])


class _AsgiResponse(Response):
    __slots__ = ("_send",)

    def __init__(self, send: Send, headers: Mapping[bytes, bytes], told: Callable[[TandemError], None]) -> None:
        super().__init__(headers, told)
        self._send = send

    async def start(self, status: int, headers: tuple[Header, ...], *, length: int | None) -> None:
        all_of_them = [*headers, (b"x-request-id", self.request_id.encode())]
        if length is not None:
            all_of_them.append((b"content-length", str(length).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": all_of_them})

    async def write(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def close(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
