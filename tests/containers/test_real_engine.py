"""What `docker compose up` gives by default: vLLM on a CPU, a real model, and a real KV transfer between containers."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.containers.stack import Stack, written_sizes
from tests.harness.answers import MODEL

pytestmark = pytest.mark.timeout(3000)

LONG_S = 300.0
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
    """While streams run on the decode worker, a long prompt is best computed on the prefill worker: how soon the router
    sees it so depends on how quick both are on this machine."""
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=300)
    deadline = time.monotonic() + LONG_S
    for attempt in itertools.count():
        running = [
            client.completions.create(model=MODEL, prompt=f"Story {n}.", max_tokens=600, stream=True, temperature=0)
            for n in range(4)
        ]
        for stream in running:
            next(iter(stream))
        client.completions.create(model=MODEL, prompt=f"{attempt} {STORY}", max_tokens=4, temperature=0)
        for stream in running:
            stream.close()
        if stack.kv_bytes("decode") > 0:
            return
        assert time.monotonic() < deadline, f"no KV moved for any of {attempt + 1} long prompts"
