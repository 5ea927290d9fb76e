"""What is simulated: kinds of workers (GPU and model, as a timing profile with memory and links) and fleets of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from tandem.compiled import pickled_by_fields
from tandem.core.profiles import PROFILES, Profile
from tandem.core.types import Role
from tandem.errors import ConfigError
from tandem.wire import profile_file


@dataclass(frozen=True, slots=True)
class Hardware:
    """One worker: model, GPUs and how it goes. KV room is what 90 % of the GPU memory leaves beside the weights."""

    profile: Profile
    kv_tokens: int
    kv_bytes_per_token: int
    gpus: int
    link_bytes_per_s: float = 50e9
    max_num_seqs: int = 256
    max_model_len: int = 131_072
    chunk_tokens: int = 0  # of its steps, whatever its role; 0 = by role


pickled_by_fields(Hardware)


def _hardware(profile: str, gpus: int, memory_gb: float, weights_gb: float, kv_bytes_per_token: int) -> Hardware:
    room = (0.9 * memory_gb * gpus - weights_gb) * 1e9
    return Hardware(PROFILES[profile], int(room / kv_bytes_per_token), kv_bytes_per_token, gpus)


HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        # 80 layers x 8 KV heads x 128 x (K and V) x 2 bytes; 32 layers for the 8B model
        "h100-70b-tp4": _hardware("sim-h100-llama-70b-tp4", 4, 80.0, 141.0, 327_680),
        "h100-70b-tp8": _hardware("sim-h100-llama-70b-tp8", 8, 80.0, 141.0, 327_680),
        "h100-70b-fp8-tp4": _hardware("sim-h100-llama-70b-fp8-tp4", 4, 80.0, 70.6, 327_680),
        "h100-8b": _hardware("sim-h100-llama-8b-tp1", 1, 80.0, 16.0, 131_072),
        "a100-70b-tp4": _hardware("sim-a100-llama-70b-tp4", 4, 80.0, 141.0, 327_680),
        "a100-70b-tp8": _hardware("sim-a100-llama-70b-tp8", 8, 80.0, 141.0, 327_680),
        "a100-8b": _hardware("sim-a100-llama-8b-tp1", 1, 80.0, 16.0, 131_072),
        # 36 layers x 8 KV heads x 64 x (K and V) x 2 bytes, the windowed half not saved
        "h100-gpt-oss-120b-tp4": _hardware("sim-h100-gpt-oss-120b-tp4", 4, 80.0, 65.2, 73_728),
        "a100-gpt-oss-120b-tp4": _hardware("sim-a100-gpt-oss-120b-tp4", 4, 80.0, 65.2, 73_728),
    }
)


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """One worker of a fleet. ``misfit`` makes its real steps so many times longer than its profile says."""

    id: str
    hardware: Hardware
    role: Role
    chunk_tokens: int
    misfit: float = 1.0

    @property
    def timing(self) -> Profile:
        """How it really goes."""
        p, f = self.hardware.profile, self.misfit
        return replace(
            p, p0=p.p0 * f, p1=p.p1 * f, p2=p.p2 * f, p3=p.p3 * f, d0=p.d0 * f, d1=p.d1 * f, d2=p.d2 * f
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fleet:
    workers: tuple[WorkerSetup, ...]

    @property
    def gpus(self) -> int:
        return sum(worker.hardware.gpus for worker in self.workers)

    def __str__(self) -> str:
        prefill = sum(worker.role is Role.PREFILL for worker in self.workers)
        return f"{prefill}P{len(self.workers) - prefill}D"


#: Chunks that suit most: a prefill worker has no decodes to protect.
PREFILL_CHUNK, DECODE_CHUNK = 8192, 2048

_SPLIT = re.compile(r"(?:(\d+)P)?(\d+)D(?:@(.+))?", re.IGNORECASE)


def make_fleet(
    hardware: str, split: str, *, chunk_tokens: int = DECODE_CHUNK, misfit: float = 1.0, kv_tokens: int = 0
) -> Fleet:
    """``split``: "3P5D", or "8D" for workers that all prefill and decode; a mixed fleet is a sum of such, each with its
    own hardware: "4P0D@h100-70b-tp4+4D@a100-70b-tp4". ``hardware`` is that of a part that names none.

    ``kv_tokens``: KV room of each worker instead of what its memory leaves. ConfigError names what is wrong.
    """
    prefill: list[WorkerSetup] = []
    decode: list[WorkerSetup] = []
    for part in split.split("+"):
        match = _SPLIT.fullmatch(part)
        if match is None:
            raise ConfigError(f"a fleet is written like 3P5D, 8D or 4P0D@KIND+4D@KIND, not {split!r}", param="fleet")
        kind = hardware_named(match[3] or hardware)
        if kv_tokens:
            kind = replace(kind, kv_tokens=kv_tokens)
        for _ in range(int(match[1] or 0)):
            prefill.append(
                WorkerSetup(f"p{len(prefill)}", kind, Role.PREFILL, kind.chunk_tokens or PREFILL_CHUNK, misfit)
            )
        for _ in range(int(match[2])):
            decode.append(WorkerSetup(f"d{len(decode)}", kind, Role.DECODE, kind.chunk_tokens or chunk_tokens, misfit))
    if not decode:
        raise ConfigError("a fleet needs a worker that decodes", param="fleet")
    fleet = Fleet((*prefill, *decode))
    if len({worker.hardware.kv_bytes_per_token for worker in fleet.workers}) > 1:
        raise ConfigError(f"the workers of {split!r} do not all serve one model", param="fleet")
    return fleet


def hardware_named(name: str) -> Hardware:
    if profile_file.is_file(name):
        return _measured(profile_file.load(Path(name)))
    if name not in HARDWARE:
        raise ConfigError(
            f"no hardware {name!r}; there is {', '.join(HARDWARE)}, and .json files that `tandem profile` writes",
            param="hardware",
        )
    return HARDWARE[name]


def _measured(content: profile_file.ProfileFile) -> Hardware:
    kind = content.worker
    return Hardware(
        content.profile,
        kv_tokens=kind.kv_blocks * kind.block_size,
        kv_bytes_per_token=kind.kv_bytes_per_token,
        gpus=kind.gpus,
        link_bytes_per_s=kind.link_bytes_per_s,
        max_num_seqs=kind.max_num_seqs,
        max_model_len=kind.max_model_len,
        chunk_tokens=kind.max_batched_tokens,
    )
