"""Who may look: in front of everything that the console serves over HTTP.

Without a token only this machine's own names are answered to, so that no foreign page reaches us through a name of its
own; with one, everything but health asks for it: as a bearer, or as the cookie that the log-in form sets. Requests that
change or start something must come from our own page. Every answer forbids what our page does not need.
"""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.console.config import LOOPBACK_NAMES

COOKIE = "tandem_console"
LOGIN = "/login"
OPEN = frozenset({"/healthz", "/readyz"})
_MAX_FORM = 4096
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Tandem console</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/static/login.css">
<main><h1>Tandem console</h1><form method="post" action="/login"><label>Token
<input type="password" name="token" autocomplete="current-password" autofocus required></label>
<button>Open</button></form><p>{}</p></main></html>"""


class Guard:
    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()
        #: What the cookie holds: not the token itself.
        self._pass = hashlib.sha256(b"tandem console " + self._token).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = await self._refusal(scope, receive)
        await (refusal or self._app)(scope, receive, guarded)
        return None

    async def _refusal(self, scope: Scope, receive: Receive) -> Response | None:
        headers, path = Headers(scope=scope), scope["path"]
        if path in OPEN:
            return None
        if not self._token and _name(headers.get("host", "")) not in LOOPBACK_NAMES:
            return PlainTextResponse("the console answers to loopback names only", 421)
        if not _same_origin(headers):
            return PlainTextResponse("not from another site's page", 403)
        if not self._token or path == "/static/login.css":
            return None
        if path == LOGIN:
            return await self._log_in(Request(scope, receive))
        if self._is_known(HTTPConnection(scope)):
            return None
        if path == "/":
            return HTMLResponse(_FORM.format(""), 401)
        return PlainTextResponse("a token is needed", 401, {"www-authenticate": "Bearer"})

    def _is_known(self, connection: HTTPConnection) -> bool:
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._token):
            return True
        return hmac.compare_digest(connection.cookies.get(COOKIE, "").encode(), self._pass.encode())

    async def _log_in(self, request: Request) -> Response:
        body = bytearray()
        if request.method == "POST":
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_FORM:
                    return PlainTextResponse("too large", 413)
        given = parse_qs(body.decode(errors="replace")).get("token", [""])[0]
        if not hmac.compare_digest(given.encode(), self._token):
            return HTMLResponse(_FORM.format("That is not the token." if given else ""), 401)
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, self._pass, httponly=True, samesite="strict", secure=secure, max_age=7 * 86400)
        return answer


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    try:
        return urlsplit("//" + host).hostname or ""
    except ValueError:
        return ""


def _same_origin(headers: Headers) -> bool:
    """Browsers say from where a request comes; programs do not, and need not."""
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host", "")
    except ValueError:
        return False
