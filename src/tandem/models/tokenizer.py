"""The tokenizer files of a byte-level BPE model from its GGUF metadata, without torch or transformers.

transformers' own conversion of this file forgets that SmolLM2 splits digits one by one (GGUF says so only by the name
of the pre-tokenizer, ``smollm``), so that "2024" would become tokens that the model has never seen in training.
Hence tokenizer.json is written here, for every environment alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}
_CONTROL_TOKEN = 3  # GGUF's token_type of what never comes from plain text


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja. ValueError for another kind of tokenizer."""
    pre = metadata["tokenizer.ggml.pre"]
    if metadata["tokenizer.ggml.model"] != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(f"tokenizer {metadata['tokenizer.ggml.model']}/{pre} is not supported")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, kind in enumerate(metadata["tokenizer.ggml.token_type"])
        if kind == _CONTROL_TOKEN
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }

    def special(name: str) -> str:
        return str(tokens[metadata[f"tokenizer.ggml.{name}_token_id"]])

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special("bos"),
        "eos_token": special("eos"),
        "unk_token": special("unknown"),
        "pad_token": special("padding"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"])
