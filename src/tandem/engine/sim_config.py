"""What a simulated engine can be told: ``EngineConfig.args`` as one checked value, and the words that it says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tandem.core.profiles import PROFILES, Profile
from tandem.engine.protocol import EngineConfig
from tandem.enginemodel.content import Vocabulary
from tandem.errors import ConfigError

_TERMS = ("p0", "p1", "p2", "p3", "d0", "d1", "d2")
_WORD = re.compile(r"[Ġ▁][a-z]{2,8}")
_MIN_WORDS = 16


@dataclass(frozen=True, slots=True)
class SimArgs:
    """Each field is a key of ``args``. Unknown keys are refused."""

    profile: str = "sim-h100-llama-8b-tp1"  # name of a profile ...
    terms: tuple[tuple[str, float], ...] = ()  # ... some of whose terms are replaced: {"p0": seconds, ...}
    step_s: float | None = None  # every step takes this long, whatever the profile
    speedup: float = 1.0  # time runs so much faster; 0 = steps take no time
    kv_blocks: int = 0  # 0 = room for four contexts of full length
    max_num_seqs: int = 256
    max_batched_tokens: int = 2048
    kv_bytes_per_token: int = 131072  # Llama-3.1-8B, bf16
    link_bytes_per_s: float = 25e9
    vocab_size: int = 0  # 0 = from the model's tokenizer, else 32,000
    token_range: tuple[int, int] | None = None  # [first, last) ids to say
    token_ids: tuple[int, ...] = ()  # exactly these ids
    eos_token_id: int | None = None
    mean_osl: int = 0  # 0 = outputs end at max_tokens only
    embedding_size: int = 64  # of a model whose task is embed

    @classmethod
    def parse(cls, args: dict[str, object]) -> SimArgs:
        """ConfigError for an unknown key or a value of the wrong shape."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(args) - known):
            raise ConfigError(f"the simulated engine knows no option {', '.join(unknown)}", param="engine_args")
        values = dict(args)
        try:
            if isinstance(terms := values.get("terms"), dict):
                values["terms"] = tuple((str(name), float(value)) for name, value in terms.items())
            for name in ("token_range", "token_ids"):
                if isinstance(ids := values.get(name), (list, tuple)):
                    values[name] = tuple(int(i) for i in ids)
            parsed = cls(**values)  # type: ignore[arg-type]
            parsed.timing()
            if parsed.embedding_size < 1:
                raise ValueError("embedding_size must be at least 1")
            if parsed.speedup < 0 or parsed.link_bytes_per_s <= 0 or parsed.kv_bytes_per_token <= 0:
                raise ValueError("speedup, link and KV sizes cannot be negative or zero")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"options of the simulated engine: {error}", param="engine_args") from error
        return parsed

    def timing(self) -> Profile:
        """The profile with replaced terms, in real seconds of the sped-up engine."""
        if self.profile not in PROFILES:
            raise ValueError(f"no profile {self.profile}; there are {', '.join(PROFILES)}")
        profile = PROFILES[self.profile]
        if self.step_s is not None:
            profile = replace(profile, p0=self.step_s, p1=0.0, p2=0.0, p3=0.0, d0=self.step_s, d1=0.0, d2=0.0)
        if unknown := sorted(set(dict(self.terms)) - set(_TERMS)):
            raise ValueError(f"no timing term {', '.join(unknown)}")
        profile = replace(profile, **dict(self.terms))  # type: ignore[arg-type]
        scale = 1.0 / self.speedup if self.speedup else 0.0
        return replace(profile, **{term: getattr(profile, term) * scale for term in _TERMS})

    def num_blocks(self, config: EngineConfig) -> int:
        return self.kv_blocks or 4 * -(-config.max_model_len // config.block_size)

    def vocabulary(self, model_path: str) -> Vocabulary:
        """Reads the tokenizer where ids are not given; then plain English words are what is said."""
        model = Path(model_path) if model_path else None
        eos = self.eos_token_id if self.eos_token_id is not None else _eos_of(model)
        ids: Sequence[int]
        if self.token_ids:
            ids = self.token_ids
        elif self.token_range is not None:
            ids = range(*self.token_range)
        else:
            ids = _words_of(model) or range(256, self.vocab_size or 32000)
        ids = [token for token in ids if token != eos] if eos in ids else ids
        if not ids or min(ids) < 0 or (self.vocab_size and max(ids) >= self.vocab_size):
            raise ConfigError("the simulated engine has no tokens to say", param="engine_args")
        return Vocabulary(ids, eos, self.mean_osl)


def _words_of(model: Path | None) -> tuple[int, ...]:
    """Ids of the tokens that are a space and a short lower-case word; () if there is no such tokenizer."""
    path = model / "tokenizer.json" if model else None
    if path is None or not path.is_file():
        return ()
    vocab = json.loads(path.read_bytes()).get("model", {}).get("vocab", {})
    if not isinstance(vocab, dict):
        return ()
    words = sorted(int(i) for text, i in vocab.items() if _WORD.fullmatch(text))
    return tuple(words) if len(words) >= _MIN_WORDS else ()


def _eos_of(model: Path | None) -> int | None:
    for name in ("generation_config.json", "config.json"):
        path = model / name if model else None
        if path is not None and path.is_file():
            eos = json.loads(path.read_bytes()).get("eos_token_id")
            if isinstance(eos, list) and eos:
                eos = eos[0]
            if isinstance(eos, int):
                return eos
    return None
