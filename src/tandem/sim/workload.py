"""What is offered to a fleet: requests with arrival times, lengths and the hashes of their prompts' blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Offered:
    """One request of a workload.

    ``hashes`` are chained: equal numbers mean equal prefixes. They cover the prompt's full blocks and may go on into
    the output, where a later prompt is known to repeat it. None = nothing is shared.
    """

    arrival_s: float
    isl_tokens: int
    osl_tokens: int
    hashes: Sequence[int] = ()
    tenant: str = "default"
    request_class: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by arrival; ``block_size`` is what ``hashes`` count in."""

    name: str
    block_size: int
    requests: tuple[Offered, ...]

    @property
    def duration_s(self) -> float:
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Mean requests per second."""
        return len(self.requests) / self.duration_s if self.duration_s else 0.0

    @property
    def max_osl_tokens(self) -> int:
        return max((request.osl_tokens for request in self.requests), default=1)

    def at_rate(self, rate: float) -> Workload:
        """The same requests, arrivals stretched or squeezed to this mean rate."""
        if not self.duration_s:
            return self
        scale = self.rate / rate
        return replace(
            self, requests=tuple(replace(request, arrival_s=request.arrival_s * scale) for request in self.requests)
        )

    def first(self, count: int) -> Workload:
        return replace(self, requests=self.requests[:count])


class Chains:
    """Gives each (parent, block) pair a number of its own: what a chained hash does, without the hashing."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, object], int] = {}

    def chain(self, blocks: Iterable[object], parent: int = 0) -> Iterator[int]:
        numbers = self._numbers
        for block in blocks:
            parent = numbers.setdefault((parent, block), len(numbers) + 1)
            yield parent
