"""Text to token ids and back for one model, from the files in its folder. No transformers, no torch.

Encoding is tokie's where that proves itself at load, else Hugging Face's ``tokenizers`` (fast_tokenizer.py).
Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM and most others) decodes through a table from token id to bytes; anything
else through the tokenizer itself. Which of the two is checked when the model is loaded, not believed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from services.frontend import fast_tokenizer
from services.frontend.canaries import canaries
from services.frontend.word_memo import WordMemo, memo_for
from tandem.errors import ConfigError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """ConfigError if ``folder`` holds no usable tokenizer.

    ``fast`` False: nothing but ``tokenizers``. ``model``: its name, for the log."""

    def __init__(self, folder: Path, *, fast: bool = True, model: str = "") -> None:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path} is missing: not a model folder in Hugging Face's layout?")
        try:
            self._hf = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception, with the reason in words
            raise ConfigError(f"{path}: not a tokenizer: {error}") from None
        # Both may be set in the file, for training's sake; a prompt is neither cut nor filled up.
        self._hf.no_truncation()
        self._hf.no_padding()
        self.vocab_size: int = self._hf.get_vocab_size(with_added_tokens=True)
        config = read_json(folder / "tokenizer_config.json")
        #: bos_token, eos_token and so on, as text.
        self.special_tokens = _special_tokens(config)
        self.special_ids = frozenset(
            token_id for token_id, token in self._hf.get_added_tokens_decoder().items() if token.special
        )
        #: id -> the bytes it stands for; None when this tokenizer is not byte-level.
        self.byte_table = _byte_table(self._hf)
        #: id -> its text, where it is text whatever stands around it; () when this tokenizer is not byte-level.
        self.text_table: Sequence[str | None] = _text_table(self.byte_table or (), self.special_ids)
        self._longest_token = self._longest()
        added = [token.content for token in self._hf.get_added_tokens_decoder().values()]
        proven = fast_tokenizer.proven(path, self._truth, added, model or folder.name) if fast else None
        #: What encodes: "tokie" or "tokenizers"; and whether that is not what was wanted.
        self.backend = "tokenizers" if proven is None else "tokie"
        self.fell_back = fast and proven is None
        self._encode = proven or self._truth
        #: Characters up to which a text is encoded on the event loop.
        self.inline_chars = fast_tokenizer.inline_chars(self._encode)
        self._memo = self._proven_memo(added) if proven is None else None
        if self._memo is not None:
            recall = self._memo.recall
            for _ in range(3):  # new words, some of them at a time
                self._memo.encode(fast_tokenizer.SAMPLE)
            self._recalled_chars = fast_tokenizer.inline_chars(lambda text, special: recall(text, len(text)) or [])

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if self._memo is not None and not add_special_tokens:
            return self._memo.encode(text)
        return self._encode(text, add_special_tokens)

    def encode_at_once(self, text: str, *, add_special_tokens: bool) -> list[int] | None:
        """None if that would hold up the event loop: ``encode`` it in a thread."""
        if len(text) <= self.inline_chars:
            return self.encode(text, add_special_tokens=add_special_tokens)
        if self._memo is not None and not add_special_tokens and len(text) <= self._recalled_chars:
            return self._memo.recall(text, self.inline_chars // 2)
        return None

    def _proven_memo(self, special_tokens: Sequence[str]) -> WordMemo | None:
        """One that gives the same tokens for the canary corpus, asked twice: new words, and known ones."""

        def truth(text: str) -> list[int]:
            return self._truth(text, False)

        memo = memo_for(self._hf, self.byte_table, truth) if self.byte_table is not None else None
        texts = canaries(special_tokens)
        if memo is None or any(memo.encode(text) != truth(text) for text in [*texts, *texts]):
            return None
        return memo

    def _truth(self, text: str, add_special_tokens: bool) -> list[int]:
        # The fast form leaves out the offsets, which nobody here needs.
        try:
            ids: list[int] = self._hf.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:
            text.encode()  # the UnicodeEncodeError that it means
            raise
        return ids

    def encode_truncated(self, text: str, limit: int) -> list[int]:
        """With special tokens, ``limit`` tokens at most: what is cut off is text, not those."""
        encoding = self._hf.encode(text, add_special_tokens=False)
        encoding.truncate(max(0, limit - self._hf.num_special_tokens_to_add(False)))
        ids: list[int] = self._hf.post_process(encoding).ids
        return ids[:limit]

    def least_tokens(self, text: str) -> int:
        """A number of tokens that ``text`` has at least, without tokenising it; 0 = nothing is known."""
        return len(text.encode("utf-8", "surrogatepass")) // self._longest_token if self._longest_token else 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._hf.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def ids_of(self, tokens: Sequence[str]) -> frozenset[int]:
        """Ids of those that are tokens."""
        found = (self._hf.token_to_id(token) for token in tokens)
        return frozenset(token_id for token_id in found if token_id is not None)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token says by itself; special tokens too. Ids that no token has say nothing."""
        if self.byte_table is not None:
            return self.byte_table[token_id] if token_id < len(self.byte_table) else b""
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _longest(self) -> int:
        """Bytes that one token covers at most; 0 where a normalizer may make a text shorter first."""
        if self.byte_table is None or self._hf.normalizer is not None:
            return 0
        return max(map(len, self.byte_table), default=0)


def read_json(path: Path) -> dict[str, Any]:
    """{} if there is no such file. ConfigError if it is no JSON object."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return data


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """As transformers names them; each is a string, or an object with ``content``."""
    found = {}
    for name in _SPECIAL:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _byte_table(hf: HfTokenizer) -> list[bytes] | None:
    decoder = json.loads(hf.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder]) if decoder.get("type") == "Sequence" else [decoder]
    if [step.get("type") for step in steps] != ["ByteLevel"]:
        return None
    byte_of = _byte_of_char()
    size = hf.get_vocab_size(with_added_tokens=True)
    table = []
    for token_id in range(size):
        token = hf.id_to_token(token_id) or ""
        # The decoder takes a token with any character outside its alphabet (an added token) at its word.
        known = [byte_of.get(char) for char in token]
        table.append(token.encode() if None in known else bytes(b for b in known if b is not None))
    return table if _table_agrees(hf, table) else None


def _text_table(byte_table: Sequence[bytes], special: frozenset[int]) -> list[str | None]:
    """None for parts of characters, and for special tokens, which may have to be left out."""
    table: list[str | None] = []
    for token_id, data in enumerate(byte_table):
        try:
            table.append(None if token_id in special else data.decode())
        except UnicodeDecodeError:
            table.append(None)
    return table


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _table_agrees(hf: HfTokenizer, table: list[bytes], samples: int = 64) -> bool:
    rng = random.Random(0)
    for _ in range(samples):
        ids = [rng.randrange(len(table)) for _ in range(16)]
        text = b"".join(table[i] for i in ids).decode("utf-8", "replace")
        if text != hf.decode(ids, skip_special_tokens=False):
            return False
    return True
