"""Natural text of chosen lengths: Python's own language reference, which comes with Python."""

from __future__ import annotations

import math
from pydoc_data import topics
from typing import Protocol


class Encoding(Protocol):
    ids: list[int]


class Tokenizer(Protocol):
    def encode(self, sequence: str) -> Encoding: ...


def natural_prompts(tokenizer: Tokenizer, count: int, shortest: int, longest: int) -> list[list[int]]:
    """``count`` prompts as token ids, of lengths spread evenly on a logarithmic scale, no two with a common start."""
    texts = sorted((text for text in topics.topics.values() if len(text) > 500), key=len)
    ratio = math.log(longest / shortest) / (count - 1)
    lengths = [round(shortest * math.exp(ratio * i)) for i in range(count)]
    # The longest prompts run over several topics; each begins at one of its own.
    prompts = []
    for i, length in enumerate(lengths):
        ids: list[int] = []
        at = len(texts) - 1 - i
        while len(ids) < length:
            ids += tokenizer.encode(texts[at].strip()[: 12 * length]).ids
            at = (at + 7) % len(texts)
        prompts.append(ids[:length])
    return prompts


#: First user messages of multi-turn chats, and what is said next whatever the answer was.
CHATS = [
    ("What is the capital of France? Answer in one sentence.", ["And of Italy?", "Which of the two is older?"]),
    ("Write a short poem about the sea.", ["Now one about mountains.", "Which one do you like better, and why?"]),
    ("Explain what a hash table is.", ["When is it slow?", "Give an example in Python."]),
]
