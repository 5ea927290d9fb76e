"""Load on a running cluster, and what became of each request: by its own record, token for token.

The simulated engine's tokens are a function of the tokens before them, so what a prompt must be answered with is known
without asking anybody.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from tandem.adapters.grpc_errors import error_of
from tandem.core.types import SamplingParams
from tandem.enginemodel.content import TokenContent, Vocabulary
from tandem.errors import Cancelled, TandemError
from tandem.v1 import inference_pb2, inference_pb2_grpc

MODEL = "SmolLM2-135M-Instruct"
BLOCK = 32
VOCABULARY = range(300, 40_000)


def words(prompt: Sequence[int], count: int) -> list[int]:
    content = TokenContent(prompt, SamplingParams(max_tokens=count), Vocabulary(VOCABULARY), BLOCK)
    return [token for _ in range(count) if (token := content.draw(0).token) is not None]


@dataclass(eq=False)
class Stream:
    """One request. Every token is compared as it comes."""

    prompt: list[int]
    max_tokens: int
    expected: list[int]
    tokens: list[int] = field(default_factory=list)
    error: TandemError | None = None
    complete: bool = False
    began_s: float = field(default_factory=time.monotonic)
    first_s: float = 0.0
    ended_s: float = 0.0
    task: asyncio.Task[None] | None = None

    @property
    def took_s(self) -> float:
        return self.ended_s - self.began_s

    async def run(self, stub: inference_pb2_grpc.InferenceServiceStub, timeout_s: float) -> None:
        request = inference_pb2.GenerateRequest(
            model=MODEL,
            token_ids=inference_pb2.TokenIds(ids=self.prompt),
            options=inference_pb2.GenerateOptions(max_tokens=self.max_tokens, temperature=0.0, ignore_eos=True),
        )
        last = inference_pb2.GenerateResponse()
        try:
            async for last in stub.Generate(request, timeout=timeout_s):
                self.first_s = self.first_s or time.monotonic()
                self.tokens += last.token_ids
                seen = len(self.tokens)
                assert self.tokens == self.expected[:seen], f"wrong token within the first {seen}"
        except grpc.aio.AioRpcError as failed:
            self.error = error_of(failed)
        else:
            assert self.tokens == self.expected, f"{len(self.tokens)} of {len(self.expected)} tokens"
            assert last.usage.completion_tokens == self.max_tokens
            assert last.usage.prompt_tokens == len(self.prompt)
            self.complete = True
        finally:
            self.ended_s = time.monotonic()


class Load:
    """Streams against one frontend."""

    def __init__(self, address: str, *, seed: int = 0, timeout_s: float = 60.0) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self._rng = random.Random(seed)
        self._timeout_s = timeout_s
        self.streams: list[Stream] = []

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self.streams:
            if stream.task is not None:
                stream.task.cancel()
        await asyncio.gather(*(s.task for s in self.streams if s.task is not None), return_exceptions=True)
        await self.channel.close(None)

    def start(self, count: int, max_tokens: int, *, isl: tuple[int, int] = (40, 400)) -> list[Stream]:
        started = []
        for _ in range(count):
            prompt = [self._rng.randrange(300, 40_000) for _ in range(self._rng.randint(*isl))]
            stream = Stream(prompt, max_tokens, words(prompt, max_tokens))
            stream.task = asyncio.create_task(stream.run(self._stub, self._timeout_s))
            started.append(stream)
        self.streams += started
        return started

    async def flowing(self, streams: Sequence[Stream], tokens: int = 3) -> None:
        """Until each of them has said something."""
        async with asyncio.timeout(30.0):
            while not all(len(s.tokens) >= tokens or s.ended_s for s in streams):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def ended(self, within_s: float = 40.0) -> None:
        """All of them: complete, or with a typed error. Raises what was wrong with a token."""
        tasks = [stream.task for stream in self.streams if stream.task is not None]
        _, hanging = await asyncio.wait(tasks, timeout=within_s)
        assert not hanging, f"{len(hanging)} of {len(tasks)} requests hang"
        for task in tasks:
            task.result()

    async def all_complete(self, within_s: float = 40.0) -> None:
        await self.ended(within_s)
        failed = {f"{type(s.error).__name__}: {s.error}" for s in self.streams if s.error is not None}
        assert not failed, failed

    async def complete_or_retryable(self, within_s: float = 40.0) -> int:
        """How many completed."""
        await self.ended(within_s)
        wrong = [(s.error, len(s.tokens)) for s in self.streams if s.error is not None and not _may_retry(s)]
        assert not wrong, wrong
        return sum(stream.complete for stream in self.streams)


def _may_retry(stream: Stream) -> bool:
    """A gRPC server that is shutting down cancels a call that has just come in, before any of our code sees it."""
    assert stream.error is not None
    return stream.error.retryable or (isinstance(stream.error, Cancelled) and not stream.tokens)
