"""Named starting points of the performance model: roofline terms of one engine on one kind of worker.

    t_prefill_step = p0 + p1*(n + B) + p2*sum(context) + p3*K          t_decode_step = d0 + d1*B + d2*K

Seconds and tokens, see ``perf_model``. Each entry names its source and the error of its fit (mean relative residual
over the source's table); ``math.nan`` is not used: a data-sheet estimate states 0.5, "error unknown" in words.
"""

from __future__ import annotations

import math
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

    @property
    def speed(self) -> float:
        """Of prefill and decode alike: the geometric mean of both, steps of 1,024 tokens and of 16 streams."""
        prefill_s = self.p0 + 1024 * self.p1 + 1024 * 512 * self.p2
        decode_s = self.d0 + 16 * self.d1 + 16 * 1024 * self.d2
        return 1.0 / math.sqrt(prefill_s * decode_s)


#: 70B bf16 on H100 SXM, vLLM: NVIDIA AIC tables as printed by `aisimulate` (predictions, not measurements of ours);
#: relative least squares over 8 prefill points (128 to 8,192 new tokens, up to 16,384 cached) and 12 decode points
#: (batch 1 to 256, context 1,024 and 4,096). The tables have no mixed steps: p3 is taken from d2.
_AIC = "NVIDIA AIC tables (vLLM 0.24, bf16) via aisimulate"

#: Shares of a data sheet's figures that a data-sheet roofline counts on: about what the fits above come to.
_COMPUTE_SHARE, _BANDWIDTH_SHARE = 0.6, 0.7


@dataclass(frozen=True, slots=True)
class _Gpu:
    """One GPU, from NVIDIA's data sheet: dense FLOP/s in bf16 and in FP8, bytes/s of its memory."""

    name: str
    bf16: float
    fp8: float
    bandwidth: float


_H100 = _Gpu("H100 SXM", 989e12, 1979e12, 3.35e12)
_A100 = _Gpu("A100 SXM 80 GB", 312e12, 0.0, 2.039e12)


@dataclass(frozen=True, slots=True)
class _Model:
    """From the model's card: what a token computes, what a step reads."""

    name: str
    active: float  # parameters that one token meets
    weight_bytes: float  # read by each step: all experts of a mixture, right from batches of about 64 on
    attention_flops: float  # of one token per token of its context: 4 x full-attention layers x heads x head size
    kv_bytes: float  # read per token of context
    fp8: bool = False


_LLAMA_8B = _Model("Llama-3.1-8B bf16", 8.03e9, 16.1e9, 4.0 * 32 * 4096, 131_072)
_LLAMA_70B = _Model("Llama-3.1-70B bf16", 70.6e9, 141.2e9, 4.0 * 80 * 8192, 327_680)
_LLAMA_70B_FP8 = _Model("Llama-3.1-70B FP8 weights, bf16 KV", 70.6e9, 70.6e9, 4.0 * 80 * 8192, 327_680, fp8=True)
#: 18 of its 36 layers see 128 tokens only: the others make the terms of the context.
_GPT_OSS_120B = _Model("gpt-oss-120b MXFP4 weights, bf16 KV", 5.13e9, 65.2e9, 4.0 * 18 * 4096, 36_864)


def _data_sheet(name: str, gpu: _Gpu, model: _Model, gpus: int) -> Profile:
    """Compute and memory traffic over data-sheet rates; no measurement behind it.

    The reading of weights that a prefill step does not hide (p0 = 0.75 d0) and a sequence's share of a decode step
    (d1 = 0.6 p1) are in proportion as in the fitted profiles.
    """
    matrix = _COMPUTE_SHARE * gpus * (gpu.fp8 if model.fp8 else gpu.bf16)
    attention = _COMPUTE_SHARE * gpus * gpu.bf16
    memory = _BANDWIDTH_SHARE * gpus * gpu.bandwidth
    p1, d0, d2 = 2.0 * model.active / matrix, model.weight_bytes / memory, model.kv_bytes / memory
    return Profile(
        name, 0.75 * d0, p1, model.attention_flops / attention, d2, d0, 0.6 * p1, d2,
        source=f"data-sheet roofline of {gpus} {gpu.name}, {model.name}, at {_COMPUTE_SHARE:.0%} of the compute and "
        f"{_BANDWIDTH_SHARE:.0%} of the bandwidth; error unknown",
        relative_error=0.5,
    )  # fmt: skip


_ALL = (
    Profile(
        "generic", 1e-2, 1e-4, 1e-9, 5e-8, 2e-2, 1e-4, 5e-8,
        source="no source: an order of magnitude for a data-centre GPU, to learn from; error unknown",
        relative_error=0.5,
    ),
    Profile(
        "cpu-smollm2", 3.12e-2, 1.277e-3, 1.033e-6, 1.429e-6, 3.34e-2, 7.12e-4, 1.96e-6,
        source="`tandem profile` on vLLM 0.32 CPU, SmolLM2-135M bf16, one core of one machine: 634 steps of 62 shapes, "
        "batches up to 16, contexts up to 1,800 tokens",
        relative_error=0.067,
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
    _data_sheet("sim-h100-llama-70b-fp8-tp4", _H100, _LLAMA_70B_FP8, 4),
    _data_sheet("sim-h100-gpt-oss-120b-tp4", _H100, _GPT_OSS_120B, 4),
    _data_sheet("sim-a100-llama-8b-tp1", _A100, _LLAMA_8B, 1),
    _data_sheet("sim-a100-llama-70b-tp4", _A100, _LLAMA_70B, 4),
    _data_sheet("sim-a100-llama-70b-tp8", _A100, _LLAMA_70B, 8),
    _data_sheet("sim-a100-gpt-oss-120b-tp4", _A100, _GPT_OSS_120B, 4),
)  # fmt: skip

PROFILES: Mapping[str, Profile] = MappingProxyType({profile.name: profile for profile in _ALL})


def profile_named(name: str, known: Mapping[str, Profile] = PROFILES) -> Profile:
    """The profile of that name; ``generic`` for one that is not known here (a newer worker's): it will be learnt."""
    return known.get(name) or PROFILES["generic"]
