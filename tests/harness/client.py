"""A small synchronous gRPC client for the suites: tokens in, tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from tandem.v1 import inference_pb2, inference_pb2_grpc, router_pb2, router_pb2_grpc, worker_pb2, worker_pb2_grpc


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: list[int]
    text: str
    usage: inference_pb2.Usage
    finish_reason: int


class Client:
    def __init__(self, address: str, model: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self.model = model

    def stream(
        self, prompt: Sequence[int], max_tokens: int, *, timeout_s: float = 300.0, ignore_eos: bool = True
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Greedy."""
        request = inference_pb2.GenerateRequest(
            model=self.model,
            token_ids=inference_pb2.TokenIds(ids=prompt),
            options=inference_pb2.GenerateOptions(max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos),
        )
        return self._stub.Generate(request, timeout=timeout_s)  # type: ignore[no-any-return]

    def generate(self, prompt: Sequence[int], max_tokens: int, *, timeout_s: float = 300.0) -> Answer:
        tokens: list[int] = []
        text = ""
        last = inference_pb2.GenerateResponse()
        for last in self.stream(prompt, max_tokens, timeout_s=timeout_s):
            tokens += last.token_ids
            text += last.text
        return Answer(tokens, text, last.usage, last.finish_reason)

    def generate_all(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, at_once: int) -> list[Answer]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda p: self.generate(p, max_tokens), prompts))

    def close(self) -> None:
        self._channel.close()


def workers(router_address: str, model: str = "") -> list[router_pb2.WorkerState]:
    with grpc.insecure_channel(router_address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        return list(stub.ListWorkers(router_pb2.ListWorkersRequest(model=model), timeout=5).workers)


def describe(worker_address: str) -> worker_pb2.DescribeResponse:
    with grpc.insecure_channel(worker_address) as channel:
        return worker_pb2_grpc.WorkerServiceStub(channel).Describe(worker_pb2.DescribeRequest(), timeout=5)


def flush(worker_address: str) -> None:
    """Empties the worker's prefix cache."""
    with grpc.insecure_channel(worker_address) as channel:
        worker_pb2_grpc.WorkerServiceStub(channel).Flush(worker_pb2.FlushRequest(), timeout=30)
