"""What `docker compose up` gives by default: vLLM on a CPU, a real model, and a real KV transfer between containers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.containers.stack import Stack, written_sizes
from tests.harness.answers import MODEL

pytestmark = pytest.mark.timeout(3000)

STORY = "The quick brown fox jumps over the lazy dog. " * 120


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    made = Stack("tandem-real", "cpu")
    try:
        made.build()
        made.up()
        yield made
    except BaseException:
        with contextlib.suppress(Exception):
            print(made.logs())
        raise
    finally:
        made.down()


def test_it_knows_the_capital_of_france(stack: Stack) -> None:
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=120)
    answer = client.chat.completions.create(
        model=MODEL,
        temperature=0,
        max_tokens=20,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )
    assert "Paris" in (answer.choices[0].message.content or "")


def test_the_image_weighs_what_is_written(stack: Stack) -> None:
    (container,) = stack.containers("decode")
    assert stack.size_of_image(container) == pytest.approx(written_sizes()["worker-cpu"], rel=0.25)


def test_kv_moves_between_containers(stack: Stack) -> None:
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=300)
    # While a stream runs on the decode worker, a long prompt is computed on the prefill worker.
    running = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=600, stream=True, temperature=0
    )
    next(iter(running))
    client.completions.create(model=MODEL, prompt=STORY, max_tokens=4, temperature=0)
    running.close()
    assert stack.kv_bytes("decode") > 0
