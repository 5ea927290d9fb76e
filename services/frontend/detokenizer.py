"""Token ids to text while they arrive: a piece of text is given out as soon as no later token can change it.

A character whose bytes are spread over several tokens comes out whole, with the last of them. What never becomes a
character comes out as U+FFFD, as a decoding of all tokens at once would have it.
"""

from __future__ import annotations

from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Sequence

from services.frontend.tokenizer import Tokenizer

_Utf8 = getincrementaldecoder("utf-8")
#: Tokens whose text may wait for others. A character's bytes are at most four.
_MAX_HELD = 8


class Detokenizer:
    """One per choice. The pieces of ``push`` and ``finish``, joined, are the decoding of all tokens."""

    def push(self, token_id: int) -> str:
        raise NotImplementedError

    def push_all(self, token_ids: Sequence[int]) -> list[str]:
        """One piece for each."""
        return [self.push(token_id) for token_id in token_ids]

    @property
    def texts(self) -> Sequence[str | None] | None:
        """By token, what it says, and None where that depends on others: holds until one of those is pushed. None as a
        whole while something is held back, and where there is no such table."""
        return None

    def finish(self) -> str:
        """What was held back. Nothing is pushed after it."""
        raise NotImplementedError


def detokenizer(tokenizer: Tokenizer, *, skip_special_tokens: bool = True, but: Sequence[str] = ()) -> Detokenizer:
    """``but``: special tokens that are text all the same."""
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
    if but:
        skipped = skipped - tokenizer.ids_of(but)
    if tokenizer.byte_table is not None:
        return _ByteLevel(tokenizer.byte_table, tokenizer.text_table, skipped)
    return _Windowed(tokenizer, skipped)


class _ByteLevel(Detokenizer):
    __slots__ = ("_decoder", "_skipped", "_table", "_texts")

    def __init__(self, table: list[bytes], texts: Sequence[str | None], skipped: frozenset[int]) -> None:
        self._table = table
        self._texts = texts
        self._skipped = skipped
        #: May hold a part of a character. Most texts need none.
        self._decoder: IncrementalDecoder | None = None

    @property
    def texts(self) -> Sequence[str | None] | None:
        return self._texts if self._decoder is None or not self._decoder.getstate()[0] else None

    def push_all(self, token_ids: Sequence[int]) -> list[str]:
        """Nearly all tokens are whole characters: a look into a table, a tenth of the decoder's time."""
        texts = self.texts
        if texts is not None:
            try:
                found = [texts[token_id] for token_id in token_ids]
            except IndexError:
                found = [None]
            if None not in found:
                return found  # type: ignore[return-value]
        return [self.push(token_id) for token_id in token_ids]

    def push(self, token_id: int) -> str:
        # An id beyond the vocabulary (padding of the embedding matrix) says nothing.
        if token_id in self._skipped or token_id >= len(self._table):
            return ""
        if self._decoder is None:
            self._decoder = _Utf8("replace")
        return self._decoder.decode(self._table[token_id])

    def finish(self) -> str:
        return "" if self._decoder is None else self._decoder.decode(b"", True)


class _Windowed(Detokenizer):
    """For tokenizers whose text of a token depends on its neighbours (SentencePiece's leading space).

    Decodes a short window twice, with and without what is new: the difference is the new text. The window starts
    at a place where text was complete, and text is held back for a few tokens only, so its cost does not grow with the
    output. Bytes that never become a character may come out otherwise than from all tokens at once: such a decoder then
    rewrites the whole run of bytes.
    """

    __slots__ = ("_ids", "_read", "_skipped", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids: list[int] = []  # of the window
        self._read = 0  # those of them whose text is out

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        new = self._new_text()
        unsettled = not new or new.endswith("\N{REPLACEMENT CHARACTER}")
        if unsettled and len(self._ids) - self._read <= _MAX_HELD:
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return new

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        known = self._decode(self._ids[: self._read])
        return self._decode(self._ids)[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
