"""tokie in the place of Hugging Face's ``tokenizers`` where it proves that it gives the same tokens.

The same file is read by both; tokie is several times to thirty times faster (docs/performance.md). ``tokenizers`` is
the truth: at load both encode the canary corpus, with and without special tokens, and one difference is enough for
tokie not to be used. The proof is of this model, this file and these versions, at every start.

Texts that hold what tokie is known to get wrong always go to ``tokenizers``; the check costs next to nothing beside
the tokens (Python knows whether a string is plain ASCII without looking).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tokie

from services.frontend.canaries import canaries

log = logging.getLogger(__name__)

#: From (text, add_special_tokens) to ids.
Encode = Callable[[str, bool], list[int]]
#: tokie 0.1.2, by comparison over every character there is and over random texts: it splits 's and so on after a tab,
#: and other runs of space with a vertical tab or form feed in them ...
_MISTAKEN_ASCII = ("\t'", "\x0b", "\x0c")
#: ... doubles the first byte of characters of planes 4 to 11, which have no meaning yet, and takes no number that is a
#: letter (Roman, runic, Bamum) for a number.
_MISTAKEN = re.compile("[\u16ee-\u16f0\u2160-\u2188\ua6e6-\ua6ef\U00040000-\U000bffff]")
#: A text that takes longer than this is encoded in a thread, so that the streams do not wait for it.
INLINE_S = 0.001


def proven(path: Path, truth: Encode, special_tokens: Sequence[str], model: str) -> Encode | None:
    """tokie's encoding of the tokenizer at ``path``; None, and a line in the log, where it is not ``truth``."""
    try:
        fast = _guarded(_load(path), truth)
        different = differences(fast, truth, canaries(special_tokens))
    except tokie.TokieError as error:
        log.warning("model %s: tokie cannot take its place, so `tokenizers` tokenises: %s", model, error)
        return None
    if different:
        log.warning(
            "model %s: tokie differs from `tokenizers` in %d canary texts, so `tokenizers` tokenises; the first: %r",
            model,
            len(different),
            different[0][:200],
        )
        return None
    return fast


def _load(path: Path) -> Encode:
    tokenizer = tokie.Tokenizer.from_json(str(path))
    # Both may be set in the file, for training's sake.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encode = tokenizer.encode

    def fast(text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = encode(text, add_special_tokens).ids
        return ids

    return fast


def _guarded(fast: Encode, truth: Encode) -> Encode:
    tab_quote, vertical_tab, form_feed = _MISTAKEN_ASCII

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        if tab_quote in text or vertical_tab in text or form_feed in text:
            return truth(text, add_special_tokens)
        if not text.isascii() and _MISTAKEN.search(text) is not None:
            return truth(text, add_special_tokens)
        return fast(text, add_special_tokens)

    return encode


def differences(fast: Encode, truth: Encode, texts: Sequence[str]) -> list[str]:
    """Those of ``texts`` that are not the same tokens to both."""
    return [text for text in texts if any(fast(text, special) != truth(text, special) for special in (False, True))]


def inline_chars(encode: Encode) -> int:
    """Characters of ordinary text that take ``INLINE_S`` here: measured, the best of some attempts."""
    sample = "The quick brown fox jumps over the lazy dog, 42 times; nobody (not even it) knows why. " * 24
    best = min(_seconds(encode, sample) for _ in range(5))
    return int(len(sample) * INLINE_S / best)


def _seconds(encode: Encode, text: str) -> float:
    began = time.perf_counter()
    encode(text, False)
    return max(1e-7, time.perf_counter() - began)
