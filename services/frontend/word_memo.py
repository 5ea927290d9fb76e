"""Hugging Face's ``tokenizers`` with a memory for words: the same tokens, most of them without asking it again.

Byte-level BPE first cuts a text into words and then makes tokens of each by itself. Nearly all cutting rules cut before
a single space between two characters that are none, and where no token spans such a place nothing depends on what lies
beyond it. So what lies between two of them is tokens by itself, and can be kept: texts consist of few different words.
Several times as fast as ``tokenizers`` once the words of a text are known (docs/performance.md).

Not believed but checked: ``memo_for`` refuses what is not built like that, and at load the canary corpus must come out
the same, as for tokie (fast_tokenizer.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

#: Without special tokens.
Encode = Callable[[str], list[int]]

#: Python's \s holds every character that the cutting rules take for a space.
_between_words = re.compile(r"(?<=\S) (?=\S)").split
_spans_words = re.compile(r"\S ").search
#: Of ordinary words, of a few tokens each, some 10 MB, and 25 MB at worst.
MOST_WORDS = 32_768
LONGEST_WORD, MOST_TOKENS = 32, 8
#: A word by itself costs several times what it does within a text: with more new ones than this the text is encoded
#: whole, and some of its words are learnt.
FEW_NEW, LEARNT_OF_NEW = 6, 48


class WordMemo:
    """Of one tokenizer. Threads may share it."""

    def __init__(self, truth: Encode) -> None:
        self._truth = truth
        self._first: dict[str, list[int]] = {}
        self._words: dict[str, list[int]] = {}  # each with a space before it

    def recall(self, text: str, new_chars: int) -> list[int] | None:
        """Its tokens, if ``FEW_NEW`` of its words at most are new, and those have ``new_chars`` characters at most."""
        first, *words = _between_words(text)
        beginning = self._first.get(first)
        found = list(map(self._words.get, words))
        if beginning is None or None in found:
            new = [word for word, ids in zip(words, found, strict=True) if ids is None]
            unknown = sum(map(len, new)) + (0 if beginning else len(first))
            if len(new) > FEW_NEW or unknown > new_chars:
                return None
            beginning = beginning or _keep(self._first, first, self._truth(first))
            found = [ids or self._learn(word) for word, ids in zip(words, found, strict=True)]
        return list(chain(beginning, *found))  # type: ignore[arg-type]

    def encode(self, text: str) -> list[int]:
        known = self.recall(text, len(text))
        if known is not None:
            return known
        new = (word for word in _between_words(text)[1:] if word not in self._words)
        for word in islice(new, LEARNT_OF_NEW):
            self._learn(word)
        return self._truth(text)

    def _learn(self, word: str) -> list[int]:
        return _keep(self._words, word, self._truth(" " + word))


def _keep(known: dict[str, list[int]], word: str, ids: list[int]) -> list[int]:
    if len(word) <= LONGEST_WORD and len(ids) <= MOST_TOKENS:
        if len(known) >= MOST_WORDS:
            known.clear()
        known[word] = ids
    return ids


def memo_for(hf: HfTokenizer, byte_table: Sequence[bytes], truth: Encode) -> WordMemo | None:
    """None for a tokenizer that is not built as described above. ``byte_table``: the bytes of each token."""
    parts: dict[str, Any] = json.loads(hf.to_str())
    cutters = _steps(parts["pre_tokenizer"], "pretokenizers")
    cuts_bytes = bool(cutters) and all(
        step["type"] in ("Split", "Digits") or (step["type"] == "ByteLevel" and not step.get("add_prefix_space"))
        for step in cutters
    )
    normalizes = [step["type"] for step in _steps(parts["normalizer"], "normalizers")]
    joins_words = any(
        token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"]) for token in parts["added_tokens"]
    )
    if parts["model"]["type"] != "BPE" or not cuts_bytes or joins_words or not set(normalizes) <= {"NFC"}:
        return None
    if any(_spans_words(token.decode(errors="replace")) for token in byte_table):
        return None
    return WordMemo(truth)


def _steps(part: dict[str, Any] | None, several: str) -> Sequence[dict[str, Any]]:
    if part is None:
        return []
    steps: list[dict[str, Any]] = part[several] if part["type"] == "Sequence" else [part]
    return steps
