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
#: What tokie 0.1.2 gets wrong, by comparison over every character there is (in several surroundings) and over random
#: texts. Contractions such as 's after a tab or one of these control characters ...
_MISTAKEN_ASCII = ("\t'", "\x04", "\x06", "\x0b", "\x0c", "\x13", "\x14", "\x16", "\x1d")
#: ... numbers that are letters (Roman, runic, Bamum), circled letters, letters of the newest Unicode, and characters of
#: the upper planes, whose first byte it doubles.
_MISTAKEN = re.compile(
    "[\u088f\u0897\u0c5c\u0cdc\u16ee-\u16f0\u2160-\u2188\u24b6-\u24e9\ua6e6-\ua6ef\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1"
    "\U00010940-\U00010959\U00010d69\U00010ec5-\U00010ec7\U00010efa-\U00010efc\U000113b8-\U000113cd"
    "\U00011b60-\U00011b67\U00011db0-\U00011ddb\U0001611e-\U0001612e\U00016ea0-\U00016ed3\U00016ff2\U00016ff3"
    "\U000187f8-\U000187ff\U00018d09-\U00018df2\U0001e6c0-\U0001e6ff\U0001f130-\U0001f189\U0002b73a-\U0002b73f"
    "\U0002cea2-\U0002cead\U000323b0-\U0010ffff]"
)
#: A text that takes longer than this is encoded in a thread, so that the streams do not wait for it.
INLINE_S = 0.001
SAMPLE = "The quick brown fox jumps over the lazy dog, 42 times; nobody (not even it) knows why. " * 24


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
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        for mistaken in _MISTAKEN_ASCII:  # each a memchr: nanoseconds, where a regular expression takes microseconds
            if mistaken in text:
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
    best = min(_seconds(encode, SAMPLE) for _ in range(5))
    return int(len(SAMPLE) * INLINE_S / best)


def _seconds(encode: Encode, text: str) -> float:
    began = time.perf_counter()
    encode(text, False)
    return max(1e-7, time.perf_counter() - began)
