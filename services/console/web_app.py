"""What the console serves over HTTP: the page, its data, the live feed, and OTLP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from services.console.chrome_trace import chrome_trace
from services.console.feed import Feed
from services.console.guard import Guard
from services.console.otlp import TraceReceiver
from services.console.trace_ring import TraceRing
from services.console.trace_view import listed, whole
from services.console.trial import Question, Trials
from tandem.adapters.clock import unix_milliseconds
from tandem.spacetime.model import asset

_MAX_LISTED = 500
_MAX_QUESTION = 256_000


@dataclass(frozen=True)
class Sources:
    """What pages are made from. ``status`` and ``cluster`` give plain data."""

    ring: TraceRing
    feed: Feed
    trials: Trials
    receiver: TraceReceiver
    #: To be awaited before anything is shown.
    look: Callable[[], Awaitable[None]]
    cluster: Callable[[], Mapping[str, Any]]
    points: Callable[[int, int], Mapping[str, Any]]
    in_flight: Callable[[], list[dict[str, Any]]]
    ready: Callable[[], bool]


def web_app(sources: Sources, token: str) -> ASGIApp:
    views = _Views(sources)
    folder = resources.files("services.console").joinpath("static")
    routes = [
        Route("/", views.page),
        Route("/static/map.js", views.map_module),
        Route("/static/map.css", views.map_style),
        Mount("/static", StaticFiles(directory=str(folder))),
        Route("/healthz", views.healthz),
        Route("/readyz", views.readyz),
        Route("/api/live", endpoint=sources.feed),
        Route("/api/cluster", views.cluster),
        Route("/api/series", views.series),
        Route("/api/requests", views.requests),
        Route("/api/traces", views.traces),
        Route("/api/traces/{trace}", views.trace),
        Route("/api/traces/{trace}/chrome.json", views.chrome),
        Route("/api/try", views.attempt, methods=["POST"]),
        Route("/v1/traces", sources.receiver.over_http, methods=["POST"]),
    ]
    shown = Starlette(routes=routes)

    async def looked_at(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/api/"):
            await sources.look()
        await shown(scope, receive, send)

    return Guard(looked_at, token)


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, "application/json")


def _error(status: int, message: str) -> Response:
    return _json({"error": {"message": message}}, status)


class _Views:
    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._page = resources.files("services.console").joinpath("static/index.html").read_bytes()

    async def page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html")

    async def map_module(self, request: Request) -> Response:
        return Response(asset("map.js"), media_type="text/javascript")

    async def map_style(self, request: Request) -> Response:
        return Response(asset("map.css"), media_type="text/css")

    async def healthz(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        ready = self._sources.ready()
        return _json({"ready": ready}, 200 if ready else 503)

    async def cluster(self, request: Request) -> Response:
        return _json(self._sources.cluster())

    async def requests(self, request: Request) -> Response:
        return _json({"requests": self._sources.in_flight()})

    async def series(self, request: Request) -> Response:
        span_s = _whole(request, "span_s", 300, 30, 900)
        return _json(self._sources.points(span_s, _whole(request, "step_s", 5, 1, 60)))

    async def traces(self, request: Request) -> Response:
        query = request.query_params
        only = query.get("only", "")
        if only not in ("", "slow", "failed", "slowest"):
            return _error(400, "`only` is slow, failed or slowest (of the last minute)")
        limit, ring = _whole(request, "limit", 100, 1, _MAX_LISTED), self._sources.ring
        if only == "slowest":
            found = ring.slowest(1e6 * (unix_milliseconds() - 60_000), limit)
        else:
            found = ring.search(query.get("q", "").strip().lower(), query.get("tenant", ""), only, limit)
        return _json(
            {"kept": len(ring), "spans_received": ring.spans_received, "traces": [listed(trace) for trace in found]}
        )

    async def trace(self, request: Request) -> Response:
        found = self._sources.ring.find(request.path_params["trace"])
        if found is None:
            return _error(404, "no such trace: not sampled, not here yet, or forgotten")
        return _json(whole(found))

    async def chrome(self, request: Request) -> Response:
        found = self._sources.ring.find(request.path_params["trace"])
        if found is None:
            return _error(404, "no such trace")
        headers = {"content-disposition": f'attachment; filename="tandem-{found.trace_id}.json"'}
        return _json(chrome_trace(found.spans.values()), headers=headers)

    async def attempt(self, request: Request) -> Response:
        if not self._sources.trials.possible:
            return _error(503, "the console knows no frontend (TANDEM_FRONTENDS)")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_QUESTION:
                return _error(413, "the question is too long")
        try:
            question = msgspec.json.decode(bytes(body), type=Question)
        except msgspec.MsgspecError as error:
            return _error(400, str(error))
        if not 1 <= question.max_tokens <= 100_000:
            return _error(400, "max_tokens must be from 1 to 100,000")
        return StreamingResponse(self._sources.trials.ask(question), media_type="text/event-stream")


def _whole(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A number of the query, within bounds; the default for what is none."""
    text = request.query_params.get(name, "")
    return min(high, max(low, int(text))) if text.isdecimal() and len(text) < 10 else default
