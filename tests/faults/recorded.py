"""What a real engine answers while nobody harms it, and whether another answer is one of two that were equally good."""

from __future__ import annotations

import httpx

from tests.e2e.prompts import natural_prompts
from tests.harness.answers import Answers, RecordedAnswers, tokenizer
from tests.harness.client import Client
from tests.harness.load import Stream
from tests.harness.site import Site

PROMPTS = 48
AT_ONCE = 16
#: Two tokens whose log-probabilities differ by less may change places with the shape of the batch.
TIE = 1e-4


def recorded_answers(site: Site, tokens: int, isl: tuple[int, int]) -> RecordedAnswers:
    prompts = natural_prompts(tokenizer(), PROMPTS, *isl)
    client = Client(site.grpc, RecordedAnswers.model)
    try:
        answers = client.generate_all(prompts, tokens, at_once=AT_ONCE)
    finally:
        client.close()
    return RecordedAnswers([(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)])


async def tie(site: Site, answers: Answers, stream: Stream) -> bool:
    """Whether, where the stream first differs from what was expected, both tokens were equally likely."""
    at = stream.differs_at
    if at is None or at >= len(stream.tokens):
        return False
    body = {
        "model": answers.model,
        "prompt": stream.prompt + stream.expected[:at],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 5,
    }
    async with httpx.AsyncClient(base_url=site.url, trust_env=False, timeout=60.0) as client:
        response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        return False
    [likely] = response.json()["choices"][0]["logprobs"]["top_logprobs"]
    got, expected = (likely.get(answers.text([tokens[at]])) for tokens in (stream.tokens, stream.expected))
    print(f"token {at}: log-probability {got} instead of {expected}")
    return got is not None and expected is not None and abs(got - expected) < TIE
