"""The file that `tandem profile` writes: a timing profile, and what else is to be known of the worker it was taken on.

JSON. A deployment file's pool names it (``profile:``), and `tandem sim --hardware FILE` and `tandem plan --gpu`
simulate workers of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from tandem.core.profiles import Profile
from tandem.errors import ConfigError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Kind:
    """The worker."""

    engine: str
    engine_version: str
    model: str
    dtype: str
    block_size: int
    kv_blocks: int
    kv_bytes_per_token: int
    max_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    link_bytes_per_s: float
    gpus: int = 1  # a CPU engine counts as one


@dataclass(frozen=True, slots=True)
class ProfileFile:
    profile: Profile
    worker: Kind
    version: int = VERSION


def dump(content: ProfileFile) -> str:
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n"


def load(path: Path) -> ProfileFile:
    """ConfigError if it is missing, or no such file."""
    try:
        found = msgspec.json.decode(path.expanduser().read_bytes(), type=ProfileFile)
    except OSError as error:
        raise ConfigError(f"timing profile {path}: {error.strerror or error}", param="profile") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"timing profile {path} is no file of `tandem profile`: {error}", param="profile") from None
    if found.version != VERSION:
        raise ConfigError(f"timing profile {path} is of version {found.version}, not {VERSION}", param="profile")
    profile = found.profile
    terms = (profile.p0, profile.p1, profile.p2, profile.p3, profile.d0, profile.d1, profile.d2)
    if min(terms) < 0 or profile.p1 <= 0 or profile.d0 + profile.d1 <= 0:
        raise ConfigError(f"timing profile {path}: its terms make no step times", param="profile")
    return found


def is_file(name: str) -> bool:
    """Whether a profile's name means a file, not a built-in profile."""
    return name.endswith(".json")
