"""tokie against `tokenizers`: the same tokens for every text, or not used."""

from __future__ import annotations

import json
import logging
import os
from itertools import islice
from pathlib import Path

import pytest

from services.frontend.canaries import canaries, random_texts
from services.frontend.fast_tokenizer import differences
from services.frontend.tokenizer import Tokenizer
from tandem.models.prepare import resolve_model

#: `make tokenizer-fuzz` compares 100,000.
COUNT = int(os.environ.get("TOKENIZER_TEXTS", "3000"))
SEED = int(os.environ.get("TOKENIZER_SEED", "1"))


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("SmolLM2-135M-Instruct", weights=False, progress=lambda line: None)


@pytest.fixture(scope="module")
def fast(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def slow(folder: Path) -> Tokenizer:
    return Tokenizer(folder, fast=False)


def special(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_bytes(token_id).decode() for token_id in sorted(tokenizer.special_ids)]


def test_it_is_used_for_smollm2(fast: Tokenizer, slow: Tokenizer) -> None:
    assert (fast.backend, fast.fell_back) == ("tokie", False)
    assert (slow.backend, slow.fell_back) == ("tokenizers", False)


@pytest.mark.timeout(1200)
def test_same_tokens_for_random_texts(fast: Tokenizer, slow: Tokenizer) -> None:
    texts = islice(random_texts(special(slow), seed=SEED), COUNT)
    for text in texts:
        for add in (False, True):
            truth = slow.encode(text, add_special_tokens=add)
            assert fast.encode(text, add_special_tokens=add) == truth, repr(text)


def test_same_tokens_for_every_kind_of_character(fast: Tokenizer, slow: Tokenizer) -> None:
    """In several surroundings: all of ASCII, and one in some others, all of them in `make tokenizer-fuzz`."""
    for point in [*range(128), *range(128, 0x11_0000, 1 if COUNT >= 100_000 else 61)]:
        if not 0xD800 <= point < 0xE000:
            c = chr(point)
            text = f"{c}'ll {c} a{c}b !{c}! 1{c}1 \n{c}\n{c}  {c}'s"
            assert fast.encode(text, add_special_tokens=False) == slow.encode(text, add_special_tokens=False), hex(
                point
            )


def test_half_a_surrogate_pair_is_refused_by_both(fast: Tokenizer, slow: Tokenizer) -> None:
    for tokenizer in (fast, slow):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("a\ud800b", add_special_tokens=False)


def test_a_tokenizer_that_it_gets_wrong_is_left_to_the_truth(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here: a normalizer that tokie leaves out."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "zz"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        tokenizer = Tokenizer(tmp_path, model="odd")
    assert (tokenizer.backend, tokenizer.fell_back) == ("tokenizers", True)
    assert "model odd: tokie" in caplog.text


def test_one_difference_is_found() -> None:
    assert differences(lambda text, add: [len(text)], lambda text, add: [min(len(text), 3)], ["a", "abcd"]) == ["abcd"]


def test_canaries_hold_every_special_token() -> None:
    texts = canaries(["<|x|>", "<|y|>"])
    assert all(any(token in text and token != text for text in texts) for token in ("<|x|>", "<|y|>"))
    assert texts == canaries(["<|x|>", "<|y|>"])
