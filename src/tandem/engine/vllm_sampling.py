"""Tandem's sampling parameters as vLLM's. Imports vLLM; only ``vllm_engine`` imports this, when it starts."""

from __future__ import annotations

from typing import Any

from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.sampling_params import SamplingParams as VllmSampling

from tandem.core.types import SamplingParams, StructuredOutput


def prefill_sampling() -> VllmSampling:
    """Of the prefill leg, whatever the request wants: one greedy token that nobody sees."""
    return VllmSampling(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}},
    )


def pooling() -> PoolingParams:
    """Of an embedding: one normalised vector for the prompt, as the model's own pooling makes it."""
    return PoolingParams(task="embed")


def sampling(params: SamplingParams, kv_transfer_params: dict[str, Any] | None) -> VllmSampling:
    """ValueError for what vLLM finds out of range."""
    return VllmSampling(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=params.seed,
        min_tokens=params.min_tokens,
        ignore_eos=params.ignore_eos,
        stop_token_ids=list(params.stop_token_ids),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        structured_outputs=_structured(params.structured_output),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if kv_transfer_params is None else {"kv_transfer_params": kv_transfer_params},
    )


def _structured(wanted: StructuredOutput | None) -> StructuredOutputsParams | None:
    if wanted is None:
        return None
    return StructuredOutputsParams(
        json=wanted.json_schema,
        json_object=wanted.json_object or None,
        regex=wanted.regex,
        grammar=wanted.grammar,
    )
