"""The pieces, joined, are the decoding of all tokens at once; whole characters come out whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.frontend.detokenizer import detokenizer
from services.frontend.tokenizer import Tokenizer

relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(byte_level_folder)
    assert tokenizer.byte_table is not None
    return tokenizer


@pytest.fixture(scope="session")
def windowed(windowed_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(windowed_folder)
    assert tokenizer.byte_table is None
    return tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    streaming = detokenizer(tokenizer)
    return [*(streaming.push(i) for i in ids), streaming.finish()]


@relaxed
@given(text=st.text(max_size=40))
def test_byte_level_text_comes_back(byte_level: Tokenizer, text: str) -> None:
    out = pieces(byte_level, byte_level.encode(text, add_special_tokens=False))
    special = ("<s>", "<|im_start|>", "<|im_end|>")
    if not any(token in text for token in special):
        assert "".join(out) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in out)


@relaxed
@given(ids=st.lists(st.integers(0, 400), max_size=40))
def test_byte_level_any_tokens(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)


@relaxed
@given(text=st.text(max_size=40))
def test_windowed_text(windowed: Tokenizer, text: str) -> None:
    ids = windowed.encode(text, add_special_tokens=False)
    out = pieces(windowed, ids)
    assert "".join(out) == windowed.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in out)


@relaxed
@given(ids=st.lists(st.integers(260, 267), max_size=40))
def test_windowed_any_tokens(windowed: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(windowed, ids)) == windowed.decode(ids)


def test_bytes_that_are_no_character_cost_the_same_all_along(
    windowed: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(self, ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    (broken,) = windowed.ids_of(["<0x80>"])
    out = pieces(windowed, [broken] * 1_000)
    assert decoded < 1_000 * 50
    assert "".join(out) == "\ufffd" * 1_000
    assert len(out[-1]) < 20, "it was all held back to the end"


@pytest.mark.parametrize("text", ["👩‍👩‍👧", "naïve café 你好", "a😀b"])
def test_characters_come_out_whole(byte_level: Tokenizer, windowed: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, windowed):
        ids = tokenizer.encode(text, add_special_tokens=False)
        out = pieces(tokenizer, ids)
        assert "".join(out).strip() == text
        assert not any("\ufffd" in piece for piece in out)


def test_special_tokens_are_skipped_or_not(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|im_end|>b", add_special_tokens=False)
    assert "".join(pieces(byte_level, ids)) == "ab"
    streaming = detokenizer(byte_level, skip_special_tokens=False)
    assert "".join(map(streaming.push, ids)) == "a<|im_end|>b"


def test_added_tokens_with_spaces_are_taken_at_their_word(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("x<tool call>y", add_special_tokens=False)
    assert "".join(pieces(byte_level, ids)) == "x<tool call>y"
    assert len(ids) == 3


def test_special_tokens_that_a_parser_needs_are_text(byte_level_folder: Path) -> None:
    tokenizer = Tokenizer(byte_level_folder)
    ids = tokenizer.encode("<s><|im_start|>a", add_special_tokens=False)
    words = detokenizer(tokenizer, but=("<|im_start|>", "<no such token>"))
    assert "".join(map(words.push, ids)) == "<|im_start|>a"
