"""What a cluster under test must answer, known before anybody asks.

Simulated engine: its tokens are a function of the tokens before them. Real engine, greedy, in float32: what the same
cluster answered while nobody harmed it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from tokenizers import Tokenizer

from tandem.core.types import SamplingParams
from tandem.enginemodel.content import TokenContent, Vocabulary
from tandem.models.prepare import prepare_smollm2

MODEL = "SmolLM2-135M-Instruct"
BLOCK = 32
VOCABULARY = range(300, 40_000)


class Answers(Protocol):
    model: str

    def prompt(self, rng: random.Random, isl: tuple[int, int]) -> list[int]:
        """Of ``isl`` tokens, from and to."""
        ...

    def expected(self, prompt: Sequence[int], count: int) -> list[int]: ...

    def text(self, tokens: Sequence[int]) -> str: ...


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(prepare_smollm2() / "tokenizer.json"))


class _Smollm:
    model = MODEL

    def text(self, tokens: Sequence[int]) -> str:
        return str(tokenizer().decode(list(tokens)))


class SimAnswers(_Smollm):
    """Of an engine that says ``VOCABULARY``, with blocks of ``BLOCK``."""

    def prompt(self, rng: random.Random, isl: tuple[int, int]) -> list[int]:
        return [rng.randrange(300, 40_000) for _ in range(rng.randint(*isl))]

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        content = TokenContent(prompt, SamplingParams(max_tokens=count), Vocabulary(VOCABULARY), BLOCK)
        return content.draw(0, count).tokens


class RecordedAnswers(_Smollm):
    """Of prompts that were all answered once, undisturbed."""

    def __init__(self, answered: Sequence[tuple[list[int], list[int]]]) -> None:
        self._prompts = [prompt for prompt, _ in answered]
        self._answers = {tuple(prompt): tokens for prompt, tokens in answered}

    def prompt(self, rng: random.Random, isl: tuple[int, int]) -> list[int]:
        return rng.choice([p for p in self._prompts if isl[0] <= len(p) <= isl[1]] or self._prompts)

    def expected(self, prompt: Sequence[int], count: int) -> list[int]:
        answer = self._answers[tuple(prompt)]
        assert count <= len(answer), f"only {len(answer)} tokens were recorded"
        return answer[:count]
