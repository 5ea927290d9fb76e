"""The console's API, as the commands use it."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from tandem.adapters import settings
from tandem.cli import rundir
from tandem.errors import ConfigError, InvalidRequest, Lost, UnknownRequest

_CALL_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ConsoleClientSettings:
    """What `tandem trace` and `tandem top` take from the environment."""

    console_token: str = settings.option("", doc="Token of the console, where it asks for one.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster", default="", metavar="NAME", help="which cluster, where several run on this machine"
    )
    parser.add_argument("--console", default="", metavar="URL", help="ask this console instead of this machine's")


@dataclass(frozen=True, slots=True)
class ConsoleClient:
    url: str
    token: str = ""

    @classmethod
    def of(cls, args: argparse.Namespace) -> ConsoleClient:
        """ConfigError if there is no console to ask."""
        url = args.console or rundir.find_cluster(args.cluster).console
        if not url:
            raise ConfigError("this cluster runs without its console (`console: {enabled: false}`, --console-port 0)")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--console must begin with http:// or https://, not {url!r}", param="console")
        return cls(url.rstrip("/"), settings.load(ConsoleClientSettings, shared=True).console_token)

    def cluster(self) -> dict[str, Any]:
        return self._get("/api/cluster")

    def trace(self, wanted: str) -> dict[str, Any]:
        """By trace id or request id, or the beginning of one. UnknownRequest if there is none."""
        return self._get(f"/api/traces/{quote(wanted, safe='')}")

    def traces(self, only: str, limit: int) -> list[dict[str, Any]]:
        """The newest first; ``only``: "", slow, failed, or slowest (of the last minute)."""
        found: list[dict[str, Any]] = self._get(f"/api/traces?only={only}&limit={limit}")["traces"]
        return found

    def _get(self, path: str) -> dict[str, Any]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=_CALL_S)
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            with contextlib.closing(connection):
                connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
                response = connection.getresponse()
                status, body = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"no answer from the console at {self.url}: {error}") from None
        if status == 401:
            raise ConfigError(f"the console at {self.url} asks for a token (TANDEM_CONSOLE_TOKEN)")
        if status == 404:
            raise UnknownRequest(_message(body))
        if status != 200:
            raise InvalidRequest(f"the console at {self.url} answered {status}: {_message(body)}")
        try:
            data: dict[str, Any] = json.loads(body)
        except ValueError:
            raise InvalidRequest(f"{self.url} is no Tandem console") from None
        return data


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:300]
