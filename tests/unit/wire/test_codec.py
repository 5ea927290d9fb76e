"""What goes onto the wire comes back equal."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from tandem import errors
from tandem.core.types import (
    FinishReason,
    Leg,
    RequestKey,
    Role,
    SamplingParams,
    StepTiming,
    StructuredOutput,
    WorkerAddress,
    WorkerLoad,
    WorkerSpec,
)
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
real = st.floats(allow_nan=False, allow_infinity=False)
f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
text = st.text(max_size=12)
structured = st.one_of(
    st.builds(StructuredOutput, json_schema=text),
    st.just(StructuredOutput(json_object=True)),
    st.builds(StructuredOutput, regex=text),
    st.builds(StructuredOutput, grammar=text),
)
addresses = st.builds(WorkerAddress, id=text, incarnation=u64, grpc_address=text)
steps = st.builds(
    StepTiming, duration_s=real, prefill_tokens=u32, prefill_context_tokens=u64, decode_sequences=u32, kv_tokens=u64
)


@given(
    st.builds(
        SamplingParams,
        max_tokens=u32,
        temperature=real,
        top_p=real,
        top_k=u32,
        min_p=real,
        seed=st.none() | u64,
        min_tokens=u32,
        ignore_eos=st.booleans(),
        stop_token_ids=st.lists(u32, max_size=4).map(tuple),
        presence_penalty=real,
        frequency_penalty=real,
        repetition_penalty=real,
        logit_bias=st.dictionaries(u32, f32, max_size=4).map(lambda d: tuple(sorted(d.items()))),
        logprobs=st.none() | u32,
        prompt_logprobs=st.none() | u32,
        structured_output=st.none() | structured,
    )
)
def test_sampling(sampling: SamplingParams) -> None:
    data = codec.sampling_to_wire(sampling).SerializeToString()
    assert codec.sampling_from_wire(types_pb2.SamplingParams.FromString(data)) == sampling


@given(
    st.builds(
        WorkerSpec,
        address=addresses,
        model=text,
        role=st.sampled_from(Role),
        slot=u32,
        block_size=u32,
        dtype=text,
        kv_layout=text,
        engine=text,
        engine_version=text,
        max_model_len=u32,
        kv_blocks_total=u32,
        kv_bytes_per_token=u64,
        max_batched_tokens=u32,
        max_num_seqs=u32,
        perf_profile=text,
        kv_endpoint=text,
        link_bytes_per_s=real,
        loras=st.frozensets(text, max_size=3),
        pool=text,
        draining=st.booleans(),
        wire_version=u32,
    )
)
def test_spec(spec: WorkerSpec) -> None:
    data = codec.spec_to_wire(spec).SerializeToString()
    assert codec.spec_from_wire(bus_pb2.WorkerInfo.FromString(data)) == spec


@given(
    st.builds(
        WorkerLoad,
        worker=text,
        incarnation=u64,
        waiting_requests=u32,
        running_requests=u32,
        pending_prefill_tokens=u64,
        pending_prefill_context_tokens=u64,
        kv_blocks_used=u32,
        kv_blocks_total=u32,
        kv_tokens=u64,
        last_step_age_s=real,
        steps=st.lists(steps, max_size=3).map(tuple),
        draining=st.booleans(),
        role=st.none() | st.sampled_from(Role),
    )
)
def test_load(load: WorkerLoad) -> None:
    data = codec.load_to_wire(load).SerializeToString()
    assert codec.load_from_wire(bus_pb2.LoadReport.FromString(data)) == load


def test_every_field_of_a_type_is_on_the_wire() -> None:
    """A field added to a core type without its wire counterpart fails here, by name."""
    pairs = [
        (SamplingParams, types_pb2.SamplingParams, set()),
        (StepTiming, bus_pb2.StepTiming, set()),
        (WorkerSpec, bus_pb2.WorkerInfo, {"address"}),
        (WorkerLoad, bus_pb2.LoadReport, {"incarnation", "steps"}),
    ]
    for core, wire, renamed in pairs:
        fields = dataclasses.fields(core) if dataclasses.is_dataclass(core) else structs.fields(core)
        names = {f.name for f in fields} - renamed
        assert names <= {f.name for f in wire.DESCRIPTOR.fields}, core


@pytest.mark.parametrize("error", errors.all_errors().values(), ids=lambda cls: cls.code)
def test_errors_keep_class_message_and_retry_after(error: type[errors.TandemError]) -> None:
    back = codec.error_from_wire(codec.error_to_wire(error("why", retry_after_s=1.5)))
    assert (type(back).code, back.message, back.retry_after_s) == (error.code, "why", 1.5)


def test_a_newer_peers_error_is_an_internal_error() -> None:
    assert isinstance(codec.error_from_wire(types_pb2.ErrorDetail(code="from_2031")), errors.InternalError)


def test_enums() -> None:
    assert {codec.role_from_wire(codec.role_to_wire(role)) for role in Role} == set(Role)
    assert {codec.leg_from_wire(codec.leg_to_wire(leg)) for leg in Leg} == set(Leg)
    assert {codec.finish_from_wire(codec.finish_to_wire(why)) for why in FinishReason} == set(FinishReason)
    with pytest.raises(errors.InvalidRequest, match="unknown leg"):
        codec.leg_from_wire(bus_pb2.LEG_UNSPECIFIED)


def test_a_request_counts_the_time_it_waited_in_the_frontend() -> None:
    submit = bus_pb2.Submit(
        key=codec.key_to_wire(RequestKey("a", 2, 1)), timeout_ms=8_000, waited_ms=2_000, isl_tokens=7, tenant="t"
    )
    submit.sampling.max_tokens = 5
    request = codec.request_from_wire(submit, now=100.0)
    assert request.key == RequestKey("a", 2, 1)
    assert (request.arrival_s, request.timeout_s, request.max_osl_tokens) == (98.0, 10.0, 5)
    assert request.ttft_slo_s is None
