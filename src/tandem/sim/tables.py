"""Published step times that the timing profiles are held against, and how far off each profile is.

Llama-3.1 in bf16 on H100 SXM under vLLM 0.24, as NVIDIA's AIC tables have them (printed by ``aisimulate``). These are
that tool's figures, not measurements of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tandem.core.profiles import PROFILES, Profile
from tandem.enginemodel.profile import context_sum, step_s

_BATCHES = (1, 8, 32, 64, 128, 256)
_PROMPTS = (128, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Table:
    """Milliseconds. ``prefill``: prompts of ``_PROMPTS`` tokens; ``cached``: 1,024 new tokens on 4,096 and on 16,384;
    ``decode``: batches of ``_BATCHES`` at a context of 1,024, then of 4,096 tokens."""

    prefill: tuple[float, ...]
    cached: tuple[float, float]
    decode: tuple[tuple[float, ...], tuple[float, ...]]


TABLES: Mapping[str, Table] = MappingProxyType(
    {
        "sim-h100-llama-70b-tp4": Table(
            (20.1, 37.3, 67.4, 130, 264, 577), (70.8, 82.3),
            ((14.9, 16.1, 16.9, 19.1, 22.8, 30.5), (15.1, 16.4, 20.2, 24.1, 32.9, 51.6)),
        ),
        "sim-h100-llama-70b-tp8": Table(
            (13.8, 26.5, 46.2, 85.9, 170, 344), (47.2, 53.1),
            ((10.1, 10.1, 11.1, 12.3, 14.6, 20.0), (10.3, 10.4, 12.7, 15.4, 19.7, 30.1)),
        ),
        "sim-h100-llama-8b-tp1": Table(
            (7.6, 12.0, 22.1, 43.5, 90.1, 200), (25.5, 34.6),
            ((6.2, 6.6, 8.3, 10.3, 12.8, 19.6), (6.3, 7.9, 12.4, 17.9, 28.8, 52.0)),
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Residual:
    point: str
    table_ms: float
    profile_ms: float

    @property
    def relative(self) -> float:
        return self.profile_ms / self.table_ms - 1.0


def residuals(profile: Profile) -> list[Residual]:
    """At every point of the profile's table; KeyError if there is no table for it."""
    table = TABLES[profile.name]
    found = []
    for tokens, ms in zip(_PROMPTS, table.prefill, strict=True):
        found.append(Residual(f"prefill {tokens}", ms, 1e3 * step_s(profile, tokens, context_sum(0, tokens), 0, 0)))
    for cached, ms in zip((4096, 16384), table.cached, strict=True):
        seconds = step_s(profile, 1024, context_sum(cached, 1024), 0, 0)
        found.append(Residual(f"prefill 1024 on {cached} cached", ms, 1e3 * seconds))
    for context, row in zip((1024, 4096), table.decode, strict=True):
        for batch, ms in zip(_BATCHES, row, strict=True):
            seconds = step_s(profile, 0, 0, batch, batch * context)
            found.append(Residual(f"decode batch {batch}, context {context}", ms, 1e3 * seconds))
    return found


def to_text() -> str:
    """All residuals, and each profile's mean and worst."""
    lines = []
    for name in TABLES:
        profile = PROFILES[name]
        found = residuals(profile)
        worst = max(abs(residual.relative) for residual in found)
        mean = sum(abs(residual.relative) for residual in found) / len(found)
        lines.append(f"{name}: {profile.source}; mean {mean:.1%}, worst {worst:.1%}")
        lines += [
            f"  {residual.point:<32} table {residual.table_ms:8.1f} ms  profile {residual.profile_ms:8.1f} ms "
            f"{residual.relative:+7.1%}"
            for residual in found
        ]
    without = [name for name in PROFILES if name not in TABLES]
    lines.append(f"without a table: {', '.join(without)}")
    return "\n".join(lines)
