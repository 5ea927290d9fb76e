"""Whatever a client sends: an exchange, or an error that is the client's. Never a defect of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.frontend import served_model
from services.frontend.http_errors import http_status
from services.frontend.intake import Caller, Intake
from services.frontend.openai_requests import ChatRequest, CompletionRequest
from services.frontend.openai_routes import Exchange, OpenAIRoutes
from tandem.adapters.deployment import Deployment, Model, Pool, PoolRole, Tenant
from tandem.errors import ContextLengthExceeded, TandemError

CALLER = Caller(tenant=Tenant(name="default"))

words = st.text(max_size=8) | st.sampled_from(
    ["text", "json_object", "json_schema", "user", "auto", "<|im_end|>", "\ud800"]
)
numbers = (
    st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0, 1, 2, -1])
)
leaves = st.none() | st.booleans() | numbers | words
names = st.sampled_from(
    ["type", "text", "content", "role", "name", "function", "arguments", "json_schema", "schema", "5"]
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | words, inner, max_size=3), max_leaves=8
)
plain_messages = st.just([{"role": "user", "content": "hi"}])


def bodies(kind: type[msgspec.Struct], required: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[bytes]:
    optional = {f.name: values for f in msgspec.structs.fields(kind) if f.name not in required}
    shaped = st.fixed_dictionaries(required, optional=optional)
    # Few fields at a time, so that more than the first one is looked at.
    few = st.tuples(shaped, st.sets(st.sampled_from(sorted(optional)), max_size=3)).map(
        lambda pair: {k: v for k, v in pair[0].items() if k in required or k in pair[1]}
    )
    return (few | values).map(lambda body: json.dumps(body).encode()) | st.binary(max_size=40)


@pytest.fixture(scope="module")
def routes(byte_level_folder: Path) -> OpenAIRoutes:
    model = Model(
        name="m", path=str(byte_level_folder), max_model_len=64, pools=(Pool(role=PoolRole.AGGREGATED, engine="sim"),)
    )
    return OpenAIRoutes(Intake(Deployment(models=(model,)), [served_model.load(model)]))


relaxed = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def check(outcome: Exchange | TandemError) -> None:
    if isinstance(outcome, TandemError):
        assert 400 <= http_status(outcome) < 500
        assert outcome.message
    else:
        sampling = outcome.request.sampling
        assert all(0 < len(prompt) < 64 for prompt in outcome.request.prompts)
        assert all(len(prompt) + sampling.max_tokens <= 64 for prompt in outcome.request.prompts)
        assert 0 <= sampling.temperature <= 2 and 0 < sampling.top_p <= 1


@relaxed
@given(body=bodies(ChatRequest, {"model": st.just("m"), "messages": plain_messages | values}))
async def test_chat(routes: OpenAIRoutes, body: bytes) -> None:
    try:
        check(await routes.chat(body, CALLER, 0.0))
    except TandemError as error:
        check(error)


@relaxed
@given(
    body=bodies(
        CompletionRequest,
        {"model": st.just("m"), "prompt": st.lists(st.integers(-1, 400), max_size=70) | words | values},
    )
)
async def test_completions(routes: OpenAIRoutes, body: bytes) -> None:
    try:
        check(await routes.completions(body, CALLER, 0.0))
    except TandemError as error:
        check(error)


async def test_a_text_that_cannot_fit_is_not_tokenised(routes: OpenAIRoutes, byte_level_folder: Path) -> None:
    body = json.dumps({"model": "m", "prompt": "a b " * 500_000}).encode()
    with pytest.raises(ContextLengthExceeded, match=r"at least \d+ tokens.*64"):
        await routes.completions(body, CALLER, 0.0)
