"""Weights of a Llama-shaped model as a Hugging Face folder: dequantised from GGUF, or random and tiny.

torch, safetensors, numpy and gguf are imported here, lazily: the tokenizer-only path must not need them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.models.gguf_file import GgufFile, TensorInfo

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model that ``metadata`` describes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": metadata["llama.rope.freq_base"], "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def tiny_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Two small layers under the same tokenizer: for tests of protocol, where words do not matter."""
    return llama_config(metadata) | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }


def write_config(config: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def write_dequantised(source: GgufFile, config: dict[str, Any], folder: Path, progress: Progress) -> None:
    """model.safetensors in bf16 from the GGUF's quantised tensors."""
    import numpy as np
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    data = np.memmap(source.path, dtype=np.uint8, mode="r")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, torch.Tensor] = {}
    for done, info in enumerate(source.tensors, 1):
        kind = GGMLQuantizationType(info.ggml_type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = info.shape[-1] // block * block_bytes
        rows = int(np.prod(info.shape[:-1]))
        raw = data[info.offset : info.offset + rows * row_bytes].reshape(rows, row_bytes)
        values = torch.from_numpy(np.array(dequantize(raw, kind)).reshape(info.shape))
        name, part = _hf_name(info)
        if part in heads:
            values = _unpermute(values, heads[part])
        tensors[name] = values.to(torch.bfloat16).contiguous()
        if done % 68 == 0:
            progress(f"  dequantised {done} of {len(source.tensors)} tensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_random(config: dict[str, Any], folder: Path, seed: int = 0) -> None:
    """model.safetensors with normally distributed weights, the same ones on every machine."""
    import torch
    from safetensors.torch import save_file

    hidden, head, mlp = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        # A larger spread than the usual 0.02: greedy continuations then have clear winners.
        return (torch.randn(shape, generator=generator) * 0.2).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        tensors |= {f"model.layers.{i}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _hf_name(info: TensorInfo) -> tuple[str, str]:
    """Hugging Face's name for a GGUF tensor, and GGUF's name of the part."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", info.name):
        layer, part = match.groups()
        return f"model.layers.{layer}.{_BLOCK[part]}.weight", part
    part = info.name.removesuffix(".weight")
    return f"{_TOP[part]}.weight", part


def _unpermute(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's reordering of rotary pairs (interleaved there, halves in Hugging Face)."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
