"""`tandem chat`: a conversation in the terminal, over the same HTTP API that everybody uses."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tandem.adapters import settings
from tandem.adapters.clock import monotonic
from tandem.cli import rundir
from tandem.errors import ConfigError, InvalidRequest, Lost, TandemError

_CONNECT_S = 5.0
#: The frontend sends a comment every ten seconds while an answer is waited for.
_SILENCE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """What `tandem chat` takes from the environment."""

    api_key: str = settings.option("", doc="API key of the tenant, where the cluster asks for one.")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server."""

    url: str
    api_key: str = ""

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """The response with its body unread. Lost: not reachable; the server's own refusal as InvalidRequest."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=_CONNECT_S)
        headers = {"content-type": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        try:
            connection.connect()
            connection.sock.settimeout(_SILENCE_S)
            connection.request(method, parts.path.rstrip("/") + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"no answer from {self.url}: {error}") from None
        if response.status != 200:
            raise InvalidRequest(f"{self.url} answered {response.status}: {_reason(response.read())}")
        return response


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace").strip()[:300]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("question", nargs="?", help="ask this and leave; without it: a conversation")
    add("--model", default="", help="default: the first that is served")
    add("--system", default="", metavar="TEXT", help="system prompt")
    add("--max-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, the most likely words")
    add("--url", default="", help="of another OpenAI-compatible server, without /v1")
    add("--cluster", default="", metavar="NAME", help="which cluster, where several run on this machine")


def run(args: argparse.Namespace) -> int:
    given = settings.load(ChatSettings, shared=True)
    url = args.url or rundir.find_cluster(args.cluster).http[0]
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must begin with http:// or https://, not {url!r}", param="url")
    conversation = Conversation(Endpoint(url.rstrip("/"), given.api_key), args)
    if args.question is not None:
        conversation.ask(args.question)
        return 0
    return converse(conversation)


class Conversation:
    """The messages so far, and how the next answer is asked for."""

    def __init__(self, endpoint: Endpoint, args: argparse.Namespace) -> None:
        self._endpoint = endpoint
        self.model = args.model or _first_model(endpoint)
        self._options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
        self._system = [{"role": "system", "content": args.system}] if args.system else []
        self._messages: list[dict[str, str]] = []

    def clear(self) -> None:
        self._messages.clear()

    def ask(self, question: str) -> None:
        """Prints the answer as it comes. Ctrl-C cuts it short; what has come stays in the conversation."""
        asked = {"role": "user", "content": question}
        body = {
            "model": self.model,
            "messages": [*self._system, *self._messages, asked],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        began, first_at, said, usage = monotonic(), None, "", None
        with contextlib.closing(self._endpoint.request("POST", "/v1/chat/completions", body)) as response:
            try:
                for chunk in events(response):
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices", ()):
                        if text := choice.get("delta", {}).get("content"):
                            first_at = first_at or monotonic()
                            said += text
                            print(text, end="", flush=True)
            except KeyboardInterrupt:
                print(" ...", end="")
            finally:
                print(flush=True)
        self._messages += [asked, {"role": "assistant", "content": said}]
        if usage and first_at and sys.stdout.isatty():
            print(f"\033[2m{_figures(usage, first_at - began, monotonic() - first_at)}\033[0m")


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream. TandemError for an error event or a stream without its end."""
    while True:
        try:
            line = response.readline().rstrip()
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"the stream broke: {error}") from None
        if not line:
            if response.isclosed():
                raise Lost("the server ended the stream in the middle of the answer")
            continue
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]":
            return
        event = json.loads(line[6:])
        if "error" in event:
            raise TandemError(str(event["error"].get("message", event["error"])))
        yield event


def _first_model(endpoint: Endpoint) -> str:
    with contextlib.closing(endpoint.request("GET", "/v1/models")) as response:
        models = json.loads(response.read()).get("data", [])
    if not models:
        raise ConfigError(f"{endpoint.url} serves no model")
    return str(models[0]["id"])


def _figures(usage: dict[str, Any], ttft_s: float, rest_s: float) -> str:
    prompt, output = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    speed = f", {(output - 1) / rest_s:.0f} tokens/s" if output > 1 and rest_s > 0 else ""
    return f"{prompt} prompt tokens ({cached} cached), {output} new, first after {ttft_s * 1000:.0f} ms{speed}"


def converse(conversation: Conversation) -> int:
    """Until Ctrl-D. /new forgets what was said."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (history and editing for input())
    print(f"{conversation.model}   (Ctrl-C cuts an answer short, /new starts afresh, Ctrl-D leaves)")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if question == "/new":
            conversation.clear()
        elif question:
            try:
                conversation.ask(question)
            except TandemError as error:
                print(f"error: {error.message}", file=sys.stderr)
