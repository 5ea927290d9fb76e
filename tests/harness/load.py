"""Load on a running cluster, over gRPC and HTTP, and what became of each request: by its own record, token for token.

What a prompt must be answered with is known beforehand (tests.harness.answers). Every token is compared as it comes.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import grpc
import httpx

from tandem.adapters.grpc_errors import METADATA_KEY, error_of
from tandem.errors import Lost, TandemError, all_errors, from_code
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tests.harness.answers import Answers


@dataclass(frozen=True, slots=True)
class Address:
    """Where one frontend listens."""

    grpc: str
    http: str = ""


class Way(Enum):
    """How a request is made."""

    GRPC = "gRPC"
    STREAMED = "HTTP, streamed"
    WHOLE = "HTTP, not streamed"


@dataclass(eq=False)
class Stream:
    """One request, and its record. Times are of this process's clock."""

    prompt: list[int]
    max_tokens: int
    expected: list[int]
    #: Over HTTP the text is compared, at the end; "" = over gRPC.
    text_expected: str = ""
    streaming: bool = True
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    error: TandemError | None = None
    #: The error came as one of ours, with a code, and not as a broken connection.
    typed: bool = True
    complete: bool = False
    #: What was not as expected; "" = nothing.
    wrong: str = ""
    #: Place of the first token that differs.
    differs_at: int | None = None
    #: What it was refused with before it was sent again.
    retried: list[str] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    first_s: float = 0.0
    heard_s: float = 0.0
    longest_gap_s: float = 0.0
    ended_s: float = 0.0
    task: asyncio.Task[None] | None = None

    @property
    def took_s(self) -> float:
        return self.ended_s - self.began_s

    async def run(self, frontends: Sequence[Frontend], timeout_s: float, retries: int) -> None:
        """From the first of the frontends to the next, where one refuses or is not there, as clients' libraries do."""
        try:
            for attempt in range(retries + 1):
                frontend = frontends[attempt % len(frontends)]
                await (self._over_http if self.text_expected else self._over_grpc)(frontend, timeout_s)
                if attempt == retries or self.error is None or not self.error.retryable or self.first_s:
                    break
                self.retried.append(self.error.code)
                self.error, self.typed = None, True
                await asyncio.sleep(0.25 * 2**attempt)
        finally:
            self.ended_s = time.monotonic()

    async def _over_grpc(self, frontend: Frontend, timeout_s: float) -> None:
        request = inference_pb2.GenerateRequest(
            model=frontend.answers.model,
            token_ids=inference_pb2.TokenIds(ids=self.prompt),
            options=inference_pb2.GenerateOptions(max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True),
        )
        last = inference_pb2.GenerateResponse()
        try:
            async for last in frontend.stub.Generate(request, timeout=timeout_s):
                self._heard()
                self._take(last.token_ids)
        except grpc.aio.AioRpcError as failed:
            self.error = error_of(failed)
            self.typed = any(key == METADATA_KEY for key, _ in failed.trailing_metadata() or ())
        else:
            self._end(len(self.tokens), last.usage.prompt_tokens, last.usage.completion_tokens)

    async def _over_http(self, frontend: Frontend, timeout_s: float) -> None:
        body = {
            "model": frontend.answers.model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": self.streaming,
        }
        if self.streaming:
            body["stream_options"] = {"include_usage": True}
        usage: dict[str, int] = {}
        try:
            async with frontend.http.stream("POST", "/v1/completions", json=body, timeout=timeout_s) as response:
                if response.status_code != 200:
                    return self._failed(json.loads(await response.aread())["error"])
                async for data in _events(response) if self.streaming else _whole(response):
                    if "error" in data:
                        return self._failed(data["error"])
                    self._heard()
                    self.text += "".join(choice["text"] for choice in data["choices"])
                    usage = data.get("usage") or usage
        except httpx.HTTPError as error:
            self.error, self.typed = Lost(f"{type(error).__name__}: {error}"), False
            return None
        if not self.text_expected.startswith(self.text.rstrip("\ufffd")) or len(self.text) < len(self.text_expected):
            self.wrong = f"text of {len(self.text)} characters differs from the {len(self.text_expected)} expected"
        self._end(
            usage.get("completion_tokens", -1), usage.get("prompt_tokens", -1), usage.get("completion_tokens", -1)
        )
        return None

    def _heard(self) -> None:
        now = time.monotonic()
        if self.first_s:
            self.longest_gap_s = max(self.longest_gap_s, now - self.heard_s)
        else:
            self.first_s = now
        self.heard_s = now

    def _take(self, tokens: Sequence[int]) -> None:
        seen = len(self.tokens)
        self.tokens += tokens
        if self.differs_at is None and self.tokens[seen:] != self.expected[seen : len(self.tokens)]:
            pairs = zip(self.tokens[seen:], [*self.expected[seen:], -1], strict=False)
            self.differs_at = seen + next(i for i, (a, b) in enumerate(pairs) if a != b)
            self.wrong = f"token {self.differs_at} of {self.max_tokens} is not as expected"

    def _failed(self, error: dict[str, object]) -> None:
        code = str(error["code"])
        self.typed = code in all_errors()
        self.error = from_code(code, str(error["message"]))

    def _end(self, count: int, prompt_tokens: int, completion_tokens: int) -> None:
        if not count == completion_tokens == self.max_tokens or prompt_tokens != len(self.prompt):
            self.wrong = self.wrong or (
                f"{count} tokens; usage {prompt_tokens} + {completion_tokens}, "
                f"not {len(self.prompt)} + {self.max_tokens}"
            )
        self.complete = not self.wrong


async def _whole(response: httpx.Response):  # type: ignore[no-untyped-def]
    yield json.loads(await response.aread())


async def _events(response: httpx.Response):  # type: ignore[no-untyped-def]
    """The events of a stream. One that ends without its last line is broken."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise httpx.RemoteProtocolError("the stream ended without [DONE]")


#: A frontend that is restarted is tried again every second: gRPC by itself would wait up to two minutes.
CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 1000)]


class Frontend:
    """Clients of one frontend."""

    def __init__(self, address: Address, answers: Answers) -> None:
        self.answers = answers
        self._channel = grpc.aio.insecure_channel(address.grpc, options=CHANNEL)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
        self.http = httpx.AsyncClient(base_url=address.http, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self._channel.close(None)
        await self.http.aclose()


class Load:
    """Streams against one or several frontends, in turn. Each ``http_every``-th goes over HTTP; 0 = none."""

    def __init__(
        self,
        addresses: Sequence[Address],
        answers: Answers,
        *,
        seed: int = 0,
        timeout_s: float = 60.0,
        http_every: int = 0,
        way: Way | None = None,
        retries: int = 0,
    ) -> None:
        """``way``: of all, whatever ``http_every`` says. ``retries``: of requests of which nothing was answered."""
        self.answers = answers
        self._frontends = [Frontend(address, answers) for address in addresses]
        self._rng = random.Random(seed)
        self._timeout_s = timeout_s
        self._http_every = http_every
        self._way = way
        self._retries = retries
        self.streams: list[Stream] = []

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel(self.streams)
        for frontend in self._frontends:
            await frontend.close()

    def start(self, count: int, max_tokens: int, *, isl: tuple[int, int] = (40, 400)) -> list[Stream]:
        started = []
        for _ in range(count):
            number = len(self.streams)
            prompt = self.answers.prompt(self._rng, isl)
            expected = self.answers.expected(prompt, max_tokens)
            stream = Stream(prompt, max_tokens, expected)
            way = self._way or self._way_of(number)
            if way is not Way.GRPC:
                stream.text_expected = self.answers.text(expected)
                stream.streaming = way is Way.STREAMED
            first = number % len(self._frontends)
            frontends = [*self._frontends[first:], *self._frontends[:first]]
            stream.task = asyncio.create_task(stream.run(frontends, self._timeout_s, self._retries))
            self.streams.append(stream)
            started.append(stream)
        return started

    def _way_of(self, number: int) -> Way:
        if not self._http_every or number % self._http_every != self._http_every - 1:
            return Way.GRPC
        return Way.STREAMED if number % (2 * self._http_every) < self._http_every else Way.WHOLE

    async def arrive(self, every_s: float, max_tokens: int, *, isl: tuple[int, int] = (40, 400)) -> None:
        """One more request every so often, until cancelled."""
        while True:
            self.start(1, max_tokens, isl=isl)
            await asyncio.sleep(every_s)

    async def flowing(self, streams: Sequence[Stream], within_s: float = 30.0) -> None:
        """Until each that streams has said something."""
        async with asyncio.timeout(within_s):
            while any(s.streaming and not s.first_s and not s.ended_s for s in streams):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def cancel(self, streams: Sequence[Stream]) -> None:
        """As a client does that leaves."""
        tasks = [stream.task for stream in streams if stream.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def ended(self, within_s: float = 40.0) -> list[Stream]:
        """Waits for all of them. Returns those that hang."""
        tasks = [stream.task for stream in self.streams if stream.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=within_s)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()
        return [stream for stream in self.streams if stream.task is not None and not stream.task.done()]

    async def all_complete(self, within_s: float = 40.0) -> None:
        await self.complete_or_retryable(within_s)
        failed = {f"{type(s.error).__name__}: {s.error}" for s in self.streams if s.error is not None}
        assert not failed, failed

    async def complete_or_retryable(self, within_s: float = 40.0) -> int:
        """How many completed."""
        hanging = await self.ended(within_s)
        assert not hanging, f"{len(hanging)} of {len(self.streams)} requests hang"
        wrong = [stream.wrong for stream in self.streams if stream.wrong]
        assert not wrong, wrong
        final = [(s.error, len(s.tokens)) for s in self.streams if s.error is not None and not s.error.retryable]
        assert not final, final
        return sum(stream.complete for stream in self.streams)
