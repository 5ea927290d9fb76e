"""Who may look."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from services.console.config import ConsoleSettings
from services.console.guard import COOKIE, Guard
from tandem.errors import ConfigError

TOKEN = "a-token-of-some-length"


async def secret(request: Request) -> Response:
    return PlainTextResponse("secret")


def client(token: str = "", host: str = "127.0.0.1:8400") -> TestClient:
    paths = ("/", "/api/traces", "/healthz", "/v1/traces")
    app = Starlette(routes=[Route(path, secret, methods=["GET", "POST"]) for path in paths])
    return TestClient(Guard(app, token), base_url=f"http://{host}", follow_redirects=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1", "[::1]:8400"])
def test_without_a_token_this_machines_names_are_answered(host: str) -> None:
    answer = client(host=host).get("/api/traces")
    assert (answer.status_code, answer.text) == (200, "secret")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1"])
def test_a_foreign_name_for_this_machine_is_refused(host: str) -> None:
    assert client(host=host).get("/api/traces").status_code == 421


def test_another_sites_page_is_refused() -> None:
    asked = client()
    assert asked.post("/api/traces", headers={"origin": "http://evil.example"}).status_code == 403
    assert asked.post("/api/traces", headers={"origin": "null"}).status_code == 403
    assert asked.post("/api/traces", headers={"origin": "http://["}).status_code == 403
    assert asked.post("/api/traces", headers={"host": "["}).status_code == 421
    assert asked.post("/api/traces", headers={"origin": "http://127.0.0.1:8400"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/api/traces", "/v1/traces"])
@pytest.mark.parametrize("header", ["", "Bearer wrong", f"Basic {TOKEN}", "Bearer"])
def test_with_a_token_nothing_is_shown_without_it(path: str, header: str) -> None:
    answer = client(TOKEN, host="anything.example").get(path, headers={"authorization": header} if header else {})
    assert answer.status_code == 401 and "secret" not in answer.text


def test_with_a_token_health_is_still_told() -> None:
    assert client(TOKEN).get("/healthz").status_code == 200


def test_the_token_opens_as_bearer_and_by_logging_in() -> None:
    assert client(TOKEN).get("/", headers={"authorization": f"Bearer {TOKEN}"}).text == "secret"
    asked = client(TOKEN)
    assert asked.post("/login", data={"token": "wrong"}).status_code == 401
    entered = asked.post("/login", data={"token": TOKEN})
    assert entered.status_code == 303
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and TOKEN not in cookie
    assert asked.get("/api/traces").text == "secret"
    forged = client(TOKEN)
    forged.cookies.set(COOKIE, TOKEN)  # the cookie is not the token
    assert forged.get("/api/traces").status_code == 401


def test_beyond_loopback_it_starts_with_a_token_only() -> None:
    with pytest.raises(ConfigError, match="TANDEM_CONSOLE_TOKEN"):
        ConsoleSettings(deployment="d", http_host="0.0.0.0").check()
    with pytest.raises(ConfigError, match="16 characters"):
        ConsoleSettings(deployment="d", http_host="0.0.0.0", console_token="short").check()
    ConsoleSettings(deployment="d", http_host="0.0.0.0", console_token=TOKEN).check()
    ConsoleSettings(deployment="d").check()
