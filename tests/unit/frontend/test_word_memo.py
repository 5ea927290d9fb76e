"""The memory for words in front of `tokenizers`: the same tokens, asked for the first time and again."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HfTokenizer

from services.frontend import word_memo
from services.frontend.canaries import random_texts
from services.frontend.tokenizer import Tokenizer
from services.frontend.word_memo import WordMemo, memo_for
from tandem.models.prepare import resolve_model

COUNT = int(os.environ.get("TOKENIZER_TEXTS", "3000"))
SEED = int(os.environ.get("TOKENIZER_SEED", "1"))


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("SmolLM2-135M-Instruct", weights=False, progress=lambda line: None)


@pytest.fixture(scope="module")
def hf(folder: Path) -> HfTokenizer:
    return HfTokenizer.from_file(str(folder / "tokenizer.json"))


class Counted:
    def __init__(self, hf: HfTokenizer) -> None:
        self._hf = hf
        self.asked: list[str] = []

    def __call__(self, text: str) -> list[int]:
        self.asked.append(text)
        ids: list[int] = self._hf.encode(text, add_special_tokens=False).ids
        return ids


@pytest.mark.timeout(1200)
def test_same_tokens_for_random_texts(hf: HfTokenizer, folder: Path) -> None:
    truth = Counted(hf)
    memo = memo_for(hf, [], truth)
    assert memo is not None
    special = [token.content for token in hf.get_added_tokens_decoder().values()]
    for text in islice(random_texts(special, seed=SEED), COUNT):
        expected = truth(text)
        assert memo.encode(text) == expected, repr(text)
        recalled = memo.recall(text, len(text))
        assert recalled is None or recalled == expected, repr(text)


def test_known_words_are_not_asked_for_again(hf: HfTokenizer) -> None:
    truth = Counted(hf)
    memo = WordMemo(truth)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    memo.encode(" ".join(words))
    asked = len(truth.asked)
    assert memo.recall(" ".join(["the", *reversed(words)]), 100) is not None
    assert len(truth.asked) <= asked + 1  # "the" began the first text, and followed a space in none but the second


def test_a_text_of_new_words_is_encoded_whole_and_teaches_some(hf: HfTokenizer) -> None:
    truth = Counted(hf)
    memo = WordMemo(truth)
    text = " ".join(f"w{number}x" for number in range(500))
    assert memo.recall(text, len(text)) is None
    memo.encode(text)
    assert truth.asked.count(text) == 1 and len(truth.asked) <= word_memo.LEARNT_OF_NEW + 2
    for _ in range(500 // word_memo.LEARNT_OF_NEW + 1):
        memo.encode(text)
    assert memo.recall(text, len(text)) == hf.encode(text, add_special_tokens=False).ids


def test_it_is_bounded(hf: HfTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_memo, "MOST_WORDS", 50)
    memo = WordMemo(Counted(hf))
    for number in range(100):
        memo.encode(" ".join(f"n{number}m{i}" for i in range(6)))
        memo.encode("x " + "y" * 1000)
    assert len(memo._words) <= 50 and all(len(word) <= word_memo.LONGEST_WORD for word in memo._words)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordPiece"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": [{"content": "<a b>", "lstrip": False, "rstrip": False}]},
        {"added_tokens": [{"content": "<ab>", "lstrip": True, "rstrip": False}]},
    ],
)
def test_a_tokenizer_that_is_built_otherwise_has_none(hf: HfTokenizer, change: dict[str, Any]) -> None:
    class Described:
        def to_str(self) -> str:
            return json.dumps(json.loads(hf.to_str()) | change)

    assert memo_for(hf, [b" a", b"a"], lambda text: []) is not None
    assert memo_for(Described(), [b" a"], lambda text: []) is None  # type: ignore[arg-type]


def test_long_texts_of_known_words_need_no_thread(folder: Path) -> None:
    slow = Tokenizer(folder, fast=False)
    text = " ".join(f"word{number % 90}" for number in range(slow.inline_chars // 4))
    assert len(text) > slow.inline_chars
    assert slow.encode_at_once(text, add_special_tokens=False) is None
    truth = slow.encode(text, add_special_tokens=False)
    assert slow.encode(text, add_special_tokens=False) == truth
    assert slow.encode_at_once(text, add_special_tokens=False) == truth
    assert slow.encode_at_once(text, add_special_tokens=True) is None


def test_what_is_one_long_word_holds_nobody_up(folder: Path) -> None:
    slow = Tokenizer(folder, fast=False)
    for text in ("x" * (slow.inline_chars + 1), " " * (slow.inline_chars + 1), "a " + "b" * slow.inline_chars):
        assert slow.encode_at_once(text, add_special_tokens=False) is None


@pytest.mark.parametrize("token", [b") (", b"= ", b"a b", b"\xa4 "])
def test_none_where_a_token_spans_words(hf: HfTokenizer, token: bytes) -> None:
    """Its rules do not cut there, as BLOOM's: they let punctuation and spaces stand together."""
    assert memo_for(hf, [b"a", b"\n ", token], lambda text: []) is None


def test_words_of_many_tokens_are_not_kept(hf: HfTokenizer) -> None:
    memo = WordMemo(Counted(hf))
    memo.encode("a " + "\u9f98" * 20 + " b")
    assert all(len(ids) <= word_memo.MOST_TOKENS for ids in memo._words.values()) and memo._words
