"""What a request is expected to take, before anyone knows: output lengths by class, learnt from what has ended."""

from __future__ import annotations

from tandem.core.policy import Policy
from tandem.core.types import Request


class OutputLengths:
    """Mean output length of each class and its mean absolute deviation, with exponential memory."""

    def __init__(self, policy: Policy) -> None:
        self.reconfigure(policy)
        self._seen: dict[str, int] = {}
        self._mean: dict[str, float] = {}
        self._deviation: dict[str, float] = {}

    def reconfigure(self, policy: Policy) -> None:
        self._start = float(policy.default_osl_tokens)
        self._weight = policy.osl_memory
        self._known = policy.osl_known

    def learn(self, name: str, tokens: int) -> None:
        seen = self._seen.get(name, 0) + 1
        # The first ones weigh more, so that the built-in start is soon forgotten.
        weight = max(self._weight, 1.0 / (seen + 1))
        mean = self._mean.get(name, self._start)
        deviation = self._deviation.get(name, 0.0)
        self._deviation[name] = deviation + weight * (abs(tokens - mean) - deviation)
        self._mean[name] = mean + weight * (tokens - mean)
        self._seen[name] = seen

    def mean(self, name: str) -> float:
        """Tokens of an answer of that class, whoever asks: of the streams that a request runs beside."""
        return max(1.0, self._mean.get(name, self._start))

    def expected(self, name: str, request: Request) -> float:
        """Tokens, at least 1 and at most what the request allows."""
        if self._known:
            return float(request.max_osl_tokens)
        return max(1.0, min(float(request.max_osl_tokens), self._mean.get(name, self._start)))

    def generous(self, name: str, request: Request) -> int:
        """What to reserve room for: longer than most, at most what the request allows."""
        if self._known:
            return request.max_osl_tokens
        length = self._mean.get(name, self._start) + 2.0 * self._deviation.get(name, 0.0)
        return max(1, min(request.max_osl_tokens, int(length)))
