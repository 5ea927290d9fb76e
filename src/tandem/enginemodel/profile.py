"""How long an engine step takes by a profile (core/profiles.py has the terms and their sources). Seconds."""

from __future__ import annotations

from tandem.core.profiles import Profile


def step_s(profile: Profile, prefill_tokens: int, prefill_context: int, sequences: int, kv_tokens: int) -> float:
    """A step of ``prefill_tokens`` new tokens, whose contexts sum to ``prefill_context``, beside ``sequences`` decodes.

    The decodes read ``kv_tokens`` KV tokens.
    """
    if prefill_tokens:
        new = prefill_tokens + sequences
        return profile.p0 + profile.p1 * new + profile.p2 * prefill_context + profile.p3 * kv_tokens
    if sequences:
        return profile.d0 + profile.d1 * sequences + profile.d2 * kv_tokens
    return 0.0


def context_sum(computed: int, count: int) -> int:
    """Sum of the contexts of ``count`` tokens that follow ``computed`` others."""
    return count * computed + count * (count - 1) // 2
