"""Named starting points of the performance model: roofline terms of one engine on one kind of worker.

    t_prefill_step = p0 + p1*(n + B) + p2*sum(context) + p3*K          t_decode_step = d0 + d1*B + d2*K

Seconds and tokens, see ``perf_model``. Each entry names its source and the error of its fit (mean relative residual
over the source's table); ``math.nan`` is not used: a data-sheet estimate states 0.5, "error unknown" in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Profile:
    name: str
    p0: float
    p1: float
    p2: float
    p3: float
    d0: float
    d1: float
    d2: float
    source: str
    relative_error: float


#: 70B bf16 on H100 SXM, vLLM: NVIDIA AIC tables as printed by `aisimulate` (predictions, not measurements of ours);
#: relative least squares over 8 prefill points (128 to 8,192 new tokens, up to 16,384 cached) and 12 decode points
#: (batch 1 to 256, context 1,024 and 4,096). The tables have no mixed steps: p3 is taken from d2.
_AIC = "NVIDIA AIC tables (vLLM 0.24, bf16) via aisimulate"

_ALL = (
    Profile(
        "generic", 1e-2, 1e-4, 1e-9, 5e-8, 2e-2, 1e-4, 5e-8,
        source="no source: an order of magnitude for a data-centre GPU, to learn from; error unknown",
        relative_error=0.5,
    ),
    Profile(
        "cpu-smollm2", 5.8e-2, 7.1e-4, 6.3e-7, 2e-7, 2.2e-2, 1.3e-3, 2e-7,
        source="vLLM 0.32 CPU, SmolLM2-135M bf16, one core: prompts of 128, 1,024 and 4,096 tokens and batches 1 and 8 "
        "on one machine; as many points as terms, so the error of the fit is unknown; d2 and p3 are estimates",
        relative_error=0.3,
    ),
    Profile(
        "sim-h100-llama-70b-tp4", 1.131e-2, 5.721e-5, 8.278e-10, 2.658e-8, 1.517e-2, 3.268e-5, 2.658e-8,
        source=_AIC, relative_error=0.055,
    ),
    Profile(
        "sim-h100-llama-70b-tp8", 8.502e-3, 3.744e-5, 3.843e-10, 1.332e-8, 9.972e-3, 2.425e-5, 1.332e-8,
        source=_AIC, relative_error=0.027,
    ),
    Profile(
        "sim-h100-llama-8b-tp1", 4.462e-3, 1.787e-5, 7.581e-10, 4.118e-8, 6.301e-3, 1.108e-5, 4.118e-8,
        source=_AIC, relative_error=0.072,
    ),
)  # fmt: skip

PROFILES: Mapping[str, Profile] = MappingProxyType({profile.name: profile for profile in _ALL})


def profile_named(name: str) -> Profile:
    """The profile of that name; ``generic`` for one that is not known here (a newer worker's): it will be learnt."""
    return PROFILES.get(name, PROFILES["generic"])
