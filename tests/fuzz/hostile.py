"""Hostile inputs by the hundred thousand: bodies of every route that takes one, and what parsers of output are fed.

    python -m tests.fuzz.hostile --count 100000 --seed 1

Each input must end as an answer or as an error that is the client's (4xx), whatever it is; memory must not grow.
Seeded: what failed once fails again.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from services.frontend import served_model
from services.frontend.cluster import Cluster
from services.frontend.embedding import Embedder
from services.frontend.embeddings_route import EmbeddingsRoute
from services.frontend.http_errors import http_status
from services.frontend.intake import Caller, Intake
from services.frontend.openai_routes import OpenAIRoutes
from services.frontend.order import Patience
from services.frontend.parsers.families import new_parser
from services.frontend.parsers.forced import Named, Required
from services.frontend.parsers.output import OutputParser, Parsed
from services.frontend.tokenize_routes import TokenizeRoutes
from tandem.adapters.deployment import Deployment, Model, Pool, PoolRole, Tenant
from tandem.adapters.memory_bus import MemoryBus, MemoryHub
from tandem.errors import TandemError
from tests.unit.frontend.conftest import write_byte_level

#: Growth of resident memory over the second half that noise explains.
NOISE_BYTES = 24 << 20
CALLER = Caller(tenant=Tenant(name="default"))
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "$defs": {"x": {}}}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 1, "stop": ["x"], "min_tokens": 1}
BYTES = [b"", b'"', b"[" * 5000, b"[", b"\xff\xfe", b"\x00", b"1e400", b"\\ud800"]
#: Requests that are right, by route.
SEEDS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"model": "m", "messages": USER, "stream": True, "stream_options": {"include_usage": True}, **SAMPLING},
        {"model": "m", "messages": USER, "tools": [TOOL], "tool_choice": "required", "n": 2, "max_tokens": 5},
        {"model": "m", "messages": USER, "tools": [TOOL], "tool_choice": "auto", "logprobs": True, "top_logprobs": 2},
        {"model": "m", "messages": USER, "response_format": FORMAT, "logit_bias": {"5": 1.5}},
        {
            "model": "m",
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "3"}]},
            ],
            "chat_template_kwargs": {"x": 1},
        },
    ],
    "completions": [
        {"model": "m", "prompt": "abc", "echo": True, "logprobs": 2, "max_tokens": 4, **SAMPLING},
        {"model": "m", "prompt": [[5, 6], [7]], "n": 2, "best_of": 2, "stop_token_ids": [4]},
        {"model": "m", "prompt": ["a", "b"], "request_class": "interactive", "ttft_slo_ms": 100},
    ],
    "responses": [
        {"model": "m", "input": "hi", "instructions": "be", "max_output_tokens": 5, "metadata": {"a": "b"}},
        {
            "model": "m",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}],
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            "stream": True,
        },
    ],
    "embeddings": [
        {"model": "e", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 64, "user": "u"},
        {"model": "e", "input": [[5, 6], [7]], "truncate_prompt_tokens": 3, "request_class": "interactive"},
    ],
    "tokenize": [
        {"model": "m", "prompt": "abc", "return_token_strs": True},
        {"model": "m", "messages": USER, "tools": [TOOL], "add_generation_prompt": False},
    ],
    "detokenize": [{"model": "m", "tokens": [1, 2, 300]}],
}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**65), 1e308, -0.0, 0.5, "", "a", "m", "\ud800", "\x00",
    "<|im_end|>", "word " * 400, "{" * 50, [], {}, [[]], [[[[[[]]]]]], {"": {}}, {"$ref": "#"}, USER, TOOL, [TOOL] * 3,
    "none", "json_object", "٣", list(range(400)), {"type": "function", "function": {"name": "add"}},
]  # fmt: skip
FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    '{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": "{\\"a\\": 1}"}', "[", "]", "{", "}", '"',
    "\\", ";", "\n", " ", "add", "é", "\ufffd", "9" * 5000, "[" * 3000, '{"a":' * 3000, "NaN", "1e999", "null", "words",
    '{"name": "\\ud800", "arguments": {}}', '{"name": "add", "arguments": "{\\"a\\": \\"\\\\ud800\\"}"}',
]  # fmt: skip
FAMILIES = [("hermes", "think"), ("llama3", ""), ("mistral", "mistral"), ("", "think")]


def mutated(value: Any, rng: random.Random) -> Any:
    """``value`` with one place of it changed: replaced, removed, added or repeated."""
    place = value
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.6:
            place = place[key]
            continue
        kind = rng.random()
        if kind < 0.7:
            place[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.8:
            del place[key]
        elif isinstance(place, dict):
            place[rng.choice(["colour", "type", "name", *place])] = copy.deepcopy(rng.choice(VALUES))
        else:
            place.append(copy.deepcopy(place[key]))
        break
    return value


def body(route: str, rng: random.Random) -> bytes:
    value: Any = copy.deepcopy(rng.choice(SEEDS[route]))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        value = mutated(value, rng)
    data = bytearray(json.dumps(value).encode())
    if rng.random() < 0.25:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.choice((0, 1, 1, 9))] = rng.choice(BYTES)
    return bytes(data)


def parser(rng: random.Random) -> OutputParser:
    if rng.random() < 0.2:
        return rng.choice((Required, lambda: Named("add")))()
    tool, reasoning = rng.choice(FAMILIES)
    made = new_parser(tool, reasoning, prompt=rng.choice(("", "<think>\n")), tools=["add"])
    assert made is not None
    return made()


def feed(rng: random.Random) -> str:
    """One answer of a model to one parser; what comes out can be sent."""
    fed, text = parser(rng), "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 12)))
    parsed = Parsed()
    while text:
        length = rng.choice((1, 2, 7, 5000))
        parsed += fed.push(text[:length])
        text = text[length:]
    parsed += fed.finish()
    msgspec.json.encode(parsed)
    return "parsed with calls" if parsed.calls else "parsed as text"


Route = Callable[[bytes, Caller, float], Awaitable[object]]


async def send(routes: dict[str, Route], rng: random.Random) -> str:
    name = rng.choice(list(routes))
    data = body(name, rng)
    try:
        await routes[name](data, CALLER, 0.0)
    except TandemError as error:
        status = http_status(error)
        if not 400 <= status < 500 or not error.message:
            raise AssertionError(f"{name}: {status} {error!r} for {data!r}") from error
        return f"refused: {error.code}"
    except Exception as error:
        raise AssertionError(f"{name}: {error!r} for {data!r}") from error
    return "taken"


def routes_of(folder: Path) -> dict[str, Route]:
    pool = Pool(role=PoolRole.AGGREGATED, engine="sim")
    chat = Model(
        name="m", path=str(folder), max_model_len=64, pools=(pool,), tool_parser="hermes", reasoning_parser="think"
    )
    embedder = Model(name="e", path=str(folder), max_model_len=64, pools=(pool,), task="embed")
    intake = Intake(Deployment(models=(chat, embedder)), [served_model.load(model) for model in (chat, embedder)])
    openai, tokens = OpenAIRoutes(intake), TokenizeRoutes(intake)
    cluster = Cluster(MemoryBus(MemoryHub()), cluster="fuzz", instance="frontend", patience=Patience())
    embeddings = EmbeddingsRoute(Embedder(intake, cluster))

    async def embed(data: bytes, caller: Caller, arrival_s: float) -> None:
        work = await embeddings.embeddings(data, caller, arrival_s)
        work.close()  # from here on it is the cluster's

    return {
        "chat": openai.chat,
        "completions": openai.completions,
        "responses": openai.responses,
        "embeddings": embed,
        "tokenize": tokens.tokenize,
        "detokenize": tokens.detokenize,
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def run(folder: Path, *, count: int, seed: int) -> tuple[Counter[str], int]:
    """How inputs ended, and by how many bytes memory grew over the second half."""
    rng = random.Random(seed)
    routes = routes_of(folder)
    ends: Counter[str] = Counter()
    half = 0
    for number in range(count):
        if number == count // 2:
            half = resident_bytes()
        ends[feed(rng) if rng.random() < 0.3 else await send(routes, rng)] += 1
    return ends, resident_bytes() - half


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--count", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ends, grown = asyncio.run(run(write_byte_level(Path(folder)), count=given.count, seed=given.seed))
    for end, number in ends.most_common():
        print(f"{number:8} {end}")
    print(f"{given.count} inputs in {time.monotonic() - began:.0f} s; second half: {grown / 2**20:+.1f} MiB resident")
    return 1 if grown > NOISE_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
