"""What a sequence consists of: real token ids for the simulated engine, mere block hashes for the simulator.

``TokenContent`` draws each token as a function of *all tokens before it* (and of seed and LoRA), by a streaming XXH3
over them. So every engine continues the same tokens in the same way, and prompt + output so far, submitted as a new
prompt, continues as the original would have. The KV's taint (see block_pool) goes into the draw: wrong KV, wrong
tokens.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Protocol

import xxhash

from tandem.core.blocks import block_hash, chain, root_hash, sequence_hashes, token_bytes
from tandem.core.types import SamplingParams

_pack_token = struct.Struct("<I").pack


class Draw:
    """What was sampled, in one or more steps; ``tokens`` is empty where none are modelled. A plain class, as it is made
    for every step of every sequence."""

    __slots__ = ("stop", "stop_token_id", "tokens")

    def __init__(self, tokens: list[int], stop: bool = False, stop_token_id: int | None = None) -> None:
        self.tokens = tokens
        self.stop = stop
        self.stop_token_id = stop_token_id


class Content(Protocol):
    """Grows by what is drawn; ``hashes`` covers its full blocks as far as they are known."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def hashes(self) -> Sequence[int]: ...

    @property
    def lora(self) -> str: ...

    @property
    def cache_salt(self) -> str: ...

    @property
    def silent(self) -> bool:
        """True if ``draw`` neither gives tokens nor stops, so that it need not be called."""
        ...

    def draw(self, taint: int, count: int = 1) -> Draw:
        """The next ``count`` tokens, or fewer if one of them stops it."""
        ...

    def tail_hash(self) -> int:
        """Hash of the prompt's last, partly filled block; 0 if there is none."""
        ...

    def block_tokens(self, first: int, last: int) -> Sequence[int]:
        """Token ids of blocks ``first`` to ``last`` (exclusive); empty where no tokens are modelled."""
        ...


@dataclass(frozen=True, slots=True)
class HashContent:
    """Only lengths and block hashes. ``hashes`` may reach into the output, where a trace tells them."""

    prompt_tokens: int
    hashes: Sequence[int] = ()
    lora: str = ""
    cache_salt: str = ""
    silent: bool = True

    def draw(self, taint: int, count: int = 1) -> Draw:
        return Draw([])

    def tail_hash(self) -> int:
        return 0

    def block_tokens(self, first: int, last: int) -> Sequence[int]:
        return ()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which tokens a simulated model says. ``mean_osl`` 0 = it never ends by itself."""

    ids: Sequence[int]
    eos_id: int | None = None
    mean_osl: int = 0


class TokenContent:
    """A sequence of real token ids."""

    silent = False

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        vocabulary: Vocabulary,
        block_size: int,
        lora: str = "",
        cache_salt: str = "",
    ) -> None:
        self.prompt_tokens = len(prompt)
        self.tokens = array("I", prompt)
        self.lora = lora
        self.cache_salt = cache_salt
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._block_size = block_size
        raw = token_bytes(self.tokens)
        self._root = root_hash("engine", lora, cache_salt)
        self.hashes = sequence_hashes(raw, block_size, self._root)
        seed = 0 if sampling.seed is None else sampling.seed + 1
        self._state = xxhash.xxh3_64(raw, seed=xxhash.xxh3_64_intdigest(f"{seed}\0{lora}".encode()))
        bias = dict(sampling.logit_bias)
        self._forced = next((token for token, weight in bias.items() if weight >= 100), None)
        self._banned = frozenset(token for token, weight in bias.items() if weight <= -100)
        endless = sampling.ignore_eos or vocabulary.eos_id is None
        self._plain = endless and not sampling.stop_token_ids and self._forced is None and not self._banned

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def draw(self, taint: int, count: int = 1) -> Draw:
        if self._plain:
            return Draw(self._draw_plain(taint, count))
        sampling = self._sampling
        eos = None if sampling.ignore_eos else self._vocabulary.eos_id
        drawn: list[int] = []
        for _ in range(count):
            early = self.output_tokens < sampling.min_tokens
            token = self._pick(self._state.intdigest() ^ taint, early)
            self._state.update(_pack_token(token))
            self._extend([token])
            drawn.append(token)
            if early:
                continue
            if token in sampling.stop_token_ids:
                return Draw(drawn, stop=True, stop_token_id=token)
            if token == eos:
                return Draw(drawn, stop=True)
        return Draw(drawn)

    def _draw_plain(self, taint: int, count: int) -> list[int]:
        """Where no token is special, as for most: the same tokens at half the cost."""
        ids = self._vocabulary.ids
        digest, update, known = self._state.intdigest, self._state.update, len(ids)
        drawn: list[int] = []
        for _ in range(count):
            token = ids[(digest() ^ taint) % known]
            update(_pack_token(token))
            drawn.append(token)
        self._extend(drawn)
        return drawn

    def _pick(self, digest: int, early: bool) -> int:
        """``early``: tokens that would end the sequence are masked out."""
        vocabulary, sampling = self._vocabulary, self._sampling
        ends = vocabulary.eos_id is not None and vocabulary.mean_osl and not early and not sampling.ignore_eos
        if ends and (digest >> 32) % vocabulary.mean_osl == 0:
            assert vocabulary.eos_id is not None
            return vocabulary.eos_id
        if self._forced is not None:
            return self._forced
        ids = vocabulary.ids
        for offset in range(len(ids)):
            token = ids[(digest + offset) % len(ids)]
            if token not in self._banned and not (early and token in sampling.stop_token_ids):
                return token
        return ids[digest % len(ids)]

    def _extend(self, drawn: list[int]) -> None:
        tokens, size = self.tokens, self._block_size
        tokens.extend(drawn)
        while (end := (len(self.hashes) + 1) * size) <= len(tokens):
            parent = self.hashes[-1] if self.hashes else self._root
            self.hashes.append(chain(parent, block_hash(tokens[end - size : end].tobytes())))

    def tail_hash(self) -> int:
        full = self.prompt_tokens // self._block_size
        tail = self.tokens[full * self._block_size : self.prompt_tokens]
        return chain(self.hashes[full - 1] if full else self._root, block_hash(tail.tobytes())) if tail else 0

    def block_tokens(self, first: int, last: int) -> Sequence[int]:
        return self.tokens[first * self._block_size : last * self._block_size]

    def logprobs(self, token: int, count: int) -> list[tuple[int, float, int]]:
        """Made-up candidates for a drawn token, which ranks first: rank r has probability 2**-r."""
        ids = self._vocabulary.ids
        found = [token]
        position = xxhash.xxh3_64_intdigest(token.to_bytes(4, "little")) % len(ids)
        while len(found) < min(count, len(ids)):
            if (other := ids[position % len(ids)]) not in found:
                found.append(other)
            position += 1
        return [(found[i], (i + 1) * log(0.5), i + 1) for i in range(len(found))]


def hashed_embedding(prompt: Sequence[int], size: int) -> bytes:
    """What a simulated engine says of a prompt: feature hashing of its tokens, little-endian f32 of length one.

    Prompts that share tokens lie close to each other; ``size`` is the number of values.
    """
    values = [0.0] * size
    for token, count in Counter(prompt).items():
        digest = xxhash.xxh3_64_intdigest(token.to_bytes(4, "little"))
        values[digest % size] += count if digest >> 63 else -count
    length = sqrt(sum(value * value for value in values)) or 1.0
    return struct.pack(f"<{size}f", *(value / length for value in values))
