"""Small tables and rules: errors over HTTP, leaders, what a continuation asks for, options."""

from __future__ import annotations

import json

import msgspec
import pytest

from services.frontend.effects import Restarted, Submit
from services.frontend.http_errors import HTTP_STATUS, error_body, error_headers
from services.frontend.leaders import Leader, Leaders
from services.frontend.options import Options, convert, decode
from services.frontend.order import Consumer, Order, Patience
from services.frontend.request_table import RequestTable
from services.frontend.submission import submit_message
from services.frontend.tenants import Tenants
from tandem import errors
from tandem.adapters.deployment import Class, Deployment, Model, Pool, PoolRole, Tenant
from tandem.core.blocks import token_bytes, token_ids
from tandem.core.types import RequestKey, SamplingParams, WorkerAddress
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec

P, D = WorkerAddress("p", 7), WorkerAddress("d", 9)


# -- errors over HTTP --------------------------------------------------------------------------------------------------


def test_every_error_has_a_status() -> None:
    assert set(errors.all_errors().values()) == set(HTTP_STATUS)


@pytest.mark.parametrize("error", errors.all_errors().values(), ids=lambda cls: cls.code)
def test_clients_mistakes_are_4xx_and_retryable_errors_are_not_400(error: type[errors.TandemError]) -> None:
    status, _ = HTTP_STATUS[error]
    if issubclass(error, errors.InvalidRequest):
        assert 400 <= status < 500
    elif error is not errors.Cancelled:
        assert status == 429 or status >= 500
    body = json.loads(error_body(error("why", param="x")))["error"]
    assert (body["message"], body["param"], body["code"]) == ("why", "x", error.code)
    assert body["hint"] == error.hint and error.hint.endswith(".")
    assert codec.error_to_wire(error("why")).hint == error.hint
    assert (b"retry-after" in dict(error_headers(error("why")))) == (status in (429, 503))


def test_retry_after_is_rounded_up() -> None:
    assert error_headers(errors.Overloaded("x", retry_after_s=0.2)) == [(b"retry-after", b"1")]
    assert error_headers(errors.Overloaded("x")) == [(b"retry-after", b"1")]
    assert error_headers(errors.QueueTimeout("x", retry_after_s=1.5)) == [(b"retry-after", b"2")]
    assert error_headers(errors.EngineFailed("x")) == []


# -- leaders -----------------------------------------------------------------------------------------------------------


def test_the_highest_epoch_leads_until_it_is_silent_or_gone() -> None:
    leaders = Leaders(silence_s=1.0)
    assert leaders.current("m", 0.0) is None
    assert leaders.heard("m", "a", 5, 0.0)
    assert not leaders.heard("m", "b", 4, 0.1)  # an older one
    assert not leaders.heard("m", "a", 5, 0.2)  # nothing new
    assert leaders.current("m", 1.1) == Leader("a", 5)
    assert leaders.current("m", 1.3) is None
    assert leaders.heard("m", "a", 5, 1.4)  # back
    assert not leaders.gone("m", "b")
    assert leaders.gone("m", "a")
    assert leaders.current("m", 1.5) is None
    assert leaders.heard("m", "b", 6, 1.5)
    assert leaders.current("m", 1.6) == Leader("b", 6)
    leaders.bus_is_back(9.0)
    assert leaders.current("m", 9.5) == Leader("b", 6)
    leaders.not_listened(5.0, 14.5)  # half a second of silence was heard before
    assert leaders.current("m", 14.9) == Leader("b", 6)
    assert leaders.current("m", 15.1) is None


# -- one attempt after another -----------------------------------------------------------------------------------------


class Story:
    """A table with one journey, told step by step."""

    def __init__(self, sampling: SamplingParams, *, restartable: bool = False) -> None:
        self.table = RequestTable(Leaders(), Patience())
        self.table.leaders.heard("m", "router", 1, 0.0)
        order = Order(
            id="r",
            model="m",
            prompt=token_bytes([1, 2, 3]),
            sampling=sampling,
            arrival_s=0.0,
            deadline_s=600.0,
            restartable=restartable,
        )
        self.journey = self.table.begin(order, Consumer(), 0.0)

    def submit(self) -> bus_pb2.Submit:
        """The one that is due now."""
        effects = self.table.take_effects()
        assert any(isinstance(effect, Submit) for effect in effects)
        return bus_pb2.Submit.FromString(submit_message(self.journey, frontend="f", now=2.0))

    def tokens(self, worker: WorkerAddress, seq: int, tokens: list[int]) -> None:
        frame = bus_pb2.TokenFrame(
            worker=codec.address_to_wire(worker),
            rids=[self.journey.rid],
            seqs=[seq],
            counts=[len(tokens)],
            tokens=token_bytes(tokens),
        )
        self.table.on_frame(frame, 1.0)

    def fail(self, worker: WorkerAddress, error: errors.TandemError) -> None:
        finish = bus_pb2.Finish(rid=self.journey.rid, reason=types_pb2.FINISH_REASON_ERROR)
        finish.error.CopyFrom(codec.error_to_wire(error))
        self.table.on_frame(bus_pb2.TokenFrame(worker=codec.address_to_wire(worker), finishes=[finish]), 1.0)


def test_a_continuation_asks_for_what_is_left() -> None:
    story = Story(SamplingParams(max_tokens=10, min_tokens=4))
    first = story.submit()
    story.tokens(D, 0, [11, 12, 13])
    story.fail(D, errors.EngineFailed("broke"))
    second = story.submit()
    assert list(token_ids(second.prompt)) == [1, 2, 3, 11, 12, 13]
    assert (second.isl_tokens, second.sampling.max_tokens, second.sampling.min_tokens) == (6, 7, 1)
    assert codec.key_from_wire(second.key) == RequestKey("r", 1)
    assert second.rid != first.rid
    assert list(second.avoid_workers) == ["d"]
    assert second.timeout_ms == 598_000 and second.waited_ms == 2_000


def test_two_failed_handoffs_make_it_local_and_blame_nobody() -> None:
    story = Story(SamplingParams(max_tokens=10))
    assert not story.submit().local_only
    story.fail(D, errors.HandoffFailed("lease over"))
    assert not story.submit().local_only
    story.fail(D, errors.HandoffFailed("lease over"))
    story.table.leaders.heard("m", "router", 1, 2.9)
    story.table.on_tick(3.0)
    again = story.submit()
    assert again.local_only and not again.avoid_workers


def test_unseen_tokens_are_dropped_for_a_new_start() -> None:
    story = Story(SamplingParams(max_tokens=10, seed=1), restartable=True)
    story.submit()
    story.tokens(D, 0, [11])
    story.fail(D, errors.EngineFailed("broke"))
    assert any(isinstance(effect, Restarted) for effect in story.table.take_effects())
    again = bus_pb2.Submit.FromString(submit_message(story.journey, frontend="f", now=2.0))
    assert list(token_ids(again.prompt)) == [1, 2, 3]


def test_a_seed_draws_nothing_where_sampling_is_greedy() -> None:
    assert SamplingParams(max_tokens=1, seed=1, temperature=0.0).continuable
    assert not SamplingParams(max_tokens=1, seed=1).continuable


def test_a_restarted_worker_is_not_the_lost_one() -> None:
    story = Story(SamplingParams(max_tokens=10))
    story.submit()
    story.tokens(D, 0, [11])
    story.table.on_worker_lost(bus_pb2.WorkerLost(model="m", worker="d", incarnation=8), 1.0)
    assert story.journey.attempt == 0
    story.table.on_worker_lost(bus_pb2.WorkerLost(model="m", worker="d", incarnation=9), 1.0)
    assert story.journey.attempt == 1


def test_the_decode_worker_takes_over_from_the_prefill_worker() -> None:
    story = Story(SamplingParams(max_tokens=10))
    rid = story.submit().rid
    for worker in (P, D):
        frame = bus_pb2.TokenFrame(worker=codec.address_to_wire(worker), placed=[bus_pb2.Placed(rid=rid)])
        story.table.on_frame(frame, 1.0)
        assert story.journey.holder == worker
    story.tokens(D, 0, [11])
    late = bus_pb2.TokenFrame(worker=codec.address_to_wire(P), placed=[bus_pb2.Placed(rid=rid)])
    story.table.on_frame(late, 1.0)
    assert story.journey.holder == D
    story.fail(P, errors.UnknownRequest("handed over"))  # asked too early: no reason to give up
    assert story.journey.attempt == 0


def test_a_frame_whose_columns_do_not_fit_is_an_error() -> None:
    story = Story(SamplingParams(max_tokens=10))
    with pytest.raises(ValueError, match="columns"):
        story.table.on_frame(bus_pb2.TokenFrame(rids=[1], seqs=[0], counts=[2], tokens=token_bytes([1])), 1.0)


# -- options and tenants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"temperature": 2.1}', "temperature"),
        (b'{"temperature": "hot"}', "temperature"),
        (b'{"colour": 1}', "colour"),
        (b'{"stop": [1]}', "stop[0]"),
        (b"[]", None),
    ],
)
def test_what_is_wrong_is_named(body: bytes, param: str | None) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        decode(msgspec.json.Decoder(Options), body)
    assert caught.value.param == param


def test_nulls_are_as_good_as_nothing() -> None:
    nothing = dict.fromkeys(field.name for field in msgspec.structs.fields(Options))
    assert convert(nothing, Options) == Options()


def test_classes_of_tenants() -> None:
    deployment = Deployment(
        models=(Model(name="m", path="p", pools=(Pool(role=PoolRole.AGGREGATED),)),),
        classes=(Class(name="first"), Class(name="second")),
        tenants=(Tenant(name="t", request_class="second", api_key_sha256=("0" * 64,)),),
    )
    tenants = Tenants(deployment)
    tenant = deployment.tenants[0]
    assert tenants.request_class(tenant, None).name == "second"
    assert tenants.request_class(tenant, "first").name == "first"
    assert tenants.request_class(Tenant(name="u"), None).name == "first"
    with pytest.raises(errors.Unauthenticated):
        tenants.of_authorization("Bearer 00")  # the hash is not the key
