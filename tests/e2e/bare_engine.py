"""The reference: vLLM alone, none of Tandem's code. Reads a job as JSON on stdin, writes the answers to a file.

    {"model": folder, "prompts": [[ids]], "chats": [[first, [next, ...]]], "max_tokens": n}
 -> {"prompts": [answer], "chats": [[{"prompt": [ids], **answer}]]}
    answer = {"tokens": [ids], "gaps": [float], "second": [ids]}

``gaps``: logprob of the chosen token minus that of the runner-up (``second``) at each position.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING")


async def generate(engine: Any, ids: list[int], max_tokens: int, name: str) -> dict[str, list[Any]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2)
    outputs = [output async for output in engine.generate({"prompt_token_ids": ids}, params, name)]
    answer = outputs[-1].outputs[0]
    gaps, second = [], []
    for token, candidates in zip(answer.token_ids, answer.logprobs, strict=True):
        others = [(c.logprob, t) for t, c in candidates.items() if t != token]
        runner_up, runner_up_id = max(others)
        gaps.append(candidates[token].logprob - runner_up)
        second.append(runner_up_id)
    return {"tokens": list(answer.token_ids), "gaps": gaps, "second": second}


async def main(job: dict[str, Any]) -> dict[str, list[Any]]:
    from transformers import AutoTokenizer
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=job["model"],
            dtype="float32",
            enforce_eager=True,
            max_model_len=5120,
            block_size=32,
            kv_cache_memory_bytes=400 << 20,
            max_num_batched_tokens=512,
            max_num_seqs=16,
            disable_log_stats=True,
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    n = job["max_tokens"]
    answers: dict[str, list[Any]] = {"prompts": [], "chats": []}
    for i, ids in enumerate(job["prompts"]):
        answers["prompts"].append(await generate(engine, ids, n, f"p{i}"))
    for i, (first, following) in enumerate(job["chats"]):
        messages = [{"role": "user", "content": first}]
        turns = []
        for t, text in enumerate([*following, None]):
            ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"])
            answer = await generate(engine, ids, n, f"c{i}.{t}")
            turns.append({"prompt": ids, **answer})
            messages.append(
                {"role": "assistant", "content": tokenizer.decode(answer["tokens"], skip_special_tokens=True)}
            )
            messages.append({"role": "user", "content": text or ""})
        answers["chats"].append(turns)
    engine.shutdown()
    return answers


if __name__ == "__main__":
    answered = asyncio.run(main(json.load(sys.stdin)))
    with open(sys.argv[1], "w") as file:
        json.dump(answered, file)
