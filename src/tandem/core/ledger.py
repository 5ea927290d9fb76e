"""The requests that the scheduler knows: from submit to their end, each in one state of ``lifecycle``.

Also remembers, for a while, how requests ended, so that one that is delivered twice is answered the same way again;
and when the hard limit of each is reached.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from tandem.core.lifecycle import Event, State, advance
from tandem.core.placement import Candidate
from tandem.core.queueing import Entry
from tandem.core.types import Plan, Request, RequestKey
from tandem.errors import TandemError

#: Ends that are remembered.
_REMEMBERED = 20_000
#: Ends after which the owner sends the same key again if it likes: nothing has been answered.
_UNANSWERED = frozenset({Event.FAIL, Event.LOSE, Event.RECALL})


class Job:
    """One request. ``charged_*``: what its tenant has paid so far, in input tokens."""

    __slots__ = ("charged_input", "charged_output", "decoding_since", "entry", "itl_s", "plan", "state")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.state = State.QUEUED
        self.plan: Plan | None = None
        self.charged_input = 0.0
        self.charged_output = 0.0
        self.itl_s = 0.0  # as predicted when it was placed
        self.decoding_since: float | None = None

    @property
    def request(self) -> Request:
        return self.entry.request

    def placed(self, candidate: Candidate, input_tokens: float, output_tokens: float) -> None:
        self.state = advance(self.state, Event.PLACE)
        self.plan = candidate.plan
        self.itl_s = candidate.itl_s
        self.charged_input = input_tokens
        self.charged_output = output_tokens

    def used_by(self, now: float, output_weight: float) -> tuple[float, float]:
        """(input, output) to charge for a request that ends early: no input before the prompt was computed, output as
        far as the time that it has been decoding lets expect."""
        if self.decoding_since is None:
            return (0.0 if self.state is State.PREFILLING else self.charged_input, 0.0)
        produced = max(0.0, now - self.decoding_since) / max(self.itl_s, 1e-4)
        return self.charged_input, output_weight * min(produced, float(self.request.max_osl_tokens))

    def settle(self, input_tokens: float, output_tokens: float) -> float:
        """Charges become what was really used. Returns the difference, negative = refund."""
        difference = input_tokens + output_tokens - self.charged_input - self.charged_output
        self.charged_input, self.charged_output = input_tokens, output_tokens
        return difference


class Ledger:
    def __init__(self) -> None:
        self._jobs: dict[RequestKey, Job] = {}
        self._by_id: dict[str, list[RequestKey]] = {}
        self._queued: dict[RequestKey, float] = {}  # arrival, in the order of submission
        self._ended: OrderedDict[RequestKey, TandemError | None] = OrderedDict()
        self._limits: list[tuple[float, int, RequestKey]] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def find(self, key: RequestKey) -> Job | None:
        return self._jobs.get(key)

    def is_repeat(self, key: RequestKey) -> bool:
        """Whether this key needs no answer any more. Raises the error it was refused with before."""
        if key in self._jobs:
            return True
        if key not in self._ended:
            return False
        error = self._ended[key]
        if error is not None:
            raise error
        return True

    def open(self, entry: Entry) -> None:
        request = entry.request
        self._jobs[request.key] = Job(entry)
        self._by_id.setdefault(request.key.id, []).append(request.key)
        self._queued[request.key] = request.arrival_s
        self.limit_at(request.arrival_s + request.timeout_s, entry)

    def dequeued(self, key: RequestKey) -> None:
        self._queued.pop(key, None)

    def close(self, key: RequestKey, event: Event, error: TandemError | None = None) -> Job:
        """The one way out."""
        job = self._jobs.pop(key)
        job.state = advance(job.state, event)
        self._queued.pop(key, None)
        keys = self._by_id[key.id]
        keys.remove(key)
        if not keys:
            del self._by_id[key.id]
        if event not in _UNANSWERED:
            self.remember(key, error)
        return job

    def remember(self, key: RequestKey, error: TandemError | None) -> None:
        self._ended[key] = error
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def of_id(self, request_id: str) -> list[RequestKey]:
        return list(self._by_id.get(request_id, ()))

    # --- time limits ------------------------------------------------------------------------------------------------

    def limit_at(self, at: float, entry: Entry) -> None:
        heapq.heappush(self._limits, (at, entry.order, entry.request.key))

    def pop_expired(self, now: float) -> list[Job]:
        """Requests whose limit is reached, each once per limit."""
        expired: list[Job] = []
        while self._limits and self._limits[0][0] <= now:
            job = self._jobs.get(heapq.heappop(self._limits)[2])
            if job is not None:
                expired.append(job)
        return expired

    def next_limit(self) -> float | None:
        while self._limits and self._limits[0][2] not in self._jobs:
            heapq.heappop(self._limits)
        return self._limits[0][0] if self._limits else None

    # --- what waits -------------------------------------------------------------------------------------------------

    def queued(self) -> list[RequestKey]:
        return list(self._queued)

    def num_queued(self) -> int:
        return len(self._queued)

    def oldest_arrival(self) -> float | None:
        return min(self._queued.values(), default=None)

    def oldest_arrivals(self) -> dict[str, float]:
        """By request class; of those only in which somebody waits."""
        oldest: dict[str, float] = {}
        for key, arrival in self._queued.items():
            name = self._jobs[key].entry.request_class.name
            oldest[name] = min(arrival, oldest.get(name, arrival))
        return oldest
