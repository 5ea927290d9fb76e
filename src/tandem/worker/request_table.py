"""The requests that a worker knows: running, lately finished, and fenced off.

Pure bookkeeping, ``now`` is an argument. It is what makes delivery effectively once: a repeated (id, attempt, choice)
is not run again, an attempt at or below a fence (an abort, perhaps one that overtook its request) is dropped, and a
finished request's tokens stay for a while so that a frontend that lost a frame can ask for them.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec import Struct, field

from tandem.core.types import RequestKey
from tandem.v1 import bus_pb2

if TYPE_CHECKING:
    from tandem.worker.tracing import Stay

_NO_SUBMIT = bus_pb2.Submit()


class Running(Struct, eq=False):
    """One request on this worker. Times are this process's monotonic clock."""

    key: RequestKey
    #: Who reads its tokens, and its number for it; from ``submit``, and asked for with every token.
    frontend: str
    rid: int
    submit: bus_pb2.Submit
    leg: bus_pb2.Leg
    accepted_at: float
    #: Name of the engine's own request; changes when the engine runs it again (a failed pull).
    engine_id: str
    isl_tokens: int = 0
    embed: bool = False
    predicted_cached_tokens: int = 0
    priority: int = 0
    tokens: array[int] = field(default_factory=lambda: array("I"))
    token_times: array[float] = field(default_factory=lambda: array("d"))
    cached_tokens: int = 0
    finish: bus_pb2.Finish | None = None
    finished_at: float = 0.0
    #: The prompt is computed and the KV offered to ``peer``: what comes next is that worker's.
    handed_over: bool = False
    #: Worker that the KV comes from (on a decode worker) or goes to (on a prefill worker).
    peer: str = ""
    #: Its finish, filled as things become known; ``finish`` is this from its end on.
    answer: bus_pb2.Finish = field(default_factory=bus_pb2.Finish)
    #: The assignment, where the prompt is computed for another worker.
    produces: bus_pb2.Assignment | None = None
    #: Its KV comes, or was to come, from ``peer``.
    pulls: bool = False
    #: What only its trace needs; None = it is not traced.
    stay: Stay | None = None

    @property
    def timings(self) -> bus_pb2.Timings:
        return self.answer.timings


class RequestTable:
    def __init__(self, *, retention_s: float, fence_s: float = 60.0) -> None:
        self._retention_s = retention_s
        self._fence_s = fence_s
        self._requests: dict[RequestKey, Running] = {}
        #: Mostly one each, of which a list takes a third of a set's memory.
        self._by_id: dict[str, list[RequestKey]] = {}
        #: (id, choice or None for all) -> highest attempt that must not run.
        self._fences: dict[tuple[str, int | None], int] = {}
        self._fence_queue: deque[tuple[float, tuple[str, int | None], int]] = deque()
        self._finished: deque[tuple[float, RequestKey]] = deque()
        self.running = 0

    def admit(self, request: Running) -> bool:
        """Takes it in. False when it is known already, fenced off, or an older attempt than one known."""
        key = request.key
        if key in self._requests or self.is_fenced(key):
            return False
        siblings = self._by_id.get(key.id)
        if siblings is None:
            self._by_id[key.id] = [key]
        elif any(k.choice == key.choice and k.attempt > key.attempt for k in siblings):
            return False
        else:
            siblings.append(key)
        self._requests[key] = request
        self.running += 1
        return True

    def get(self, key: RequestKey) -> Running | None:
        return self._requests.get(key)

    def fence(self, request_id: str, max_attempt: int, choice: int | None, now: float) -> list[Running]:
        """No attempt up to ``max_attempt`` of that choice (None: of all) runs from now on; returns those that do."""
        name = (request_id, choice)
        if max_attempt > self._fences.get(name, -1):
            self._fences[name] = max_attempt
            self._fence_queue.append((now, name, max_attempt))
        known = (self._requests[key] for key in self._by_id.get(request_id, ()))
        return [r for r in known if r.finish is None and self.is_fenced(r.key)]

    def is_fenced(self, key: RequestKey) -> bool:
        if not self._fences:
            return False
        highest = max(self._fences.get((key.id, None), -1), self._fences.get((key.id, key.choice), -1))
        return key.attempt <= highest

    def of_frontend(self, frontend: str) -> list[Running]:
        return [r for r in self._requests.values() if r.finish is None and r.frontend == frontend]

    def unfinished(self) -> list[Running]:
        return [r for r in self._requests.values() if r.finish is None]

    def finished(self, request: Running, finish: bus_pb2.Finish, now: float) -> None:
        """``request`` has ended; its tokens stay for ``retention_s``."""
        request.finish = finish
        request.finished_at = now
        # Repair needs the tokens only, and the prompt is most of what would be kept. A parsed message gives its memory
        # back as a whole: clearing its fields would free nothing.
        request.submit = _NO_SUBMIT
        request.produces = None
        self.running -= 1
        self._finished.append((now, request.key))

    def sweep(self, now: float) -> None:
        """Forgets what is old."""
        while self._finished and self._finished[0][0] + self._retention_s <= now:
            _, key = self._finished.popleft()
            self._requests.pop(key, None)
            keys = self._by_id.get(key.id)
            if keys is not None:
                if key in keys:
                    keys.remove(key)
                if not keys:
                    del self._by_id[key.id]
        while self._fence_queue and self._fence_queue[0][0] + self._fence_s <= now:
            _, name, attempt = self._fence_queue.popleft()
            if self._fences.get(name) == attempt:
                del self._fences[name]

    def __iter__(self) -> Iterator[Running]:
        return iter(list(self._requests.values()))

    def __len__(self) -> int:
        return len(self._requests)
