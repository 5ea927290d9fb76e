"""Wire messages <-> core types, one pair of functions each: ``x_to_wire`` and ``x_from_wire``.

Values only: nothing here looks at a clock or reaches out. What a peer sent and we cannot read (an enum value or a
message of a newer version) raises InvalidRequest naming it; no default stands in for it silently.
"""

from __future__ import annotations

from tandem import errors
from tandem.core.types import (
    FinishReason,
    Leg,
    Request,
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

_NOBODY: frozenset[str] = frozenset()

_ROLES: dict[Role, types_pb2.Role] = {Role.PREFILL: types_pb2.ROLE_PREFILL, Role.DECODE: types_pb2.ROLE_DECODE}
_ROLES_BACK = {wire: role for role, wire in _ROLES.items()}
_LEGS: dict[Leg, bus_pb2.Leg] = {Leg.PREFILL: bus_pb2.LEG_PREFILL, Leg.LOCAL: bus_pb2.LEG_LOCAL}
_LEGS_BACK = {wire: leg for leg, wire in _LEGS.items()}
_FINISHES: dict[FinishReason, types_pb2.FinishReason] = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: types_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: types_pb2.FINISH_REASON_ERROR,
}
_FINISHES_BACK = {wire: reason for reason, wire in _FINISHES.items()}


def role_to_wire(role: Role) -> types_pb2.Role:
    return _ROLES[role]


def role_from_wire(role: types_pb2.Role) -> Role:
    try:
        return _ROLES_BACK[role]
    except KeyError:
        raise errors.InvalidRequest(f"unknown role {role} on the wire", param="role") from None


def leg_to_wire(leg: Leg) -> bus_pb2.Leg:
    return _LEGS[leg]


def leg_from_wire(leg: bus_pb2.Leg) -> Leg:
    try:
        return _LEGS_BACK[leg]
    except KeyError:
        raise errors.InvalidRequest(f"unknown leg {leg} on the wire", param="leg") from None


def finish_to_wire(reason: FinishReason) -> types_pb2.FinishReason:
    return _FINISHES[reason]


def finish_from_wire(reason: types_pb2.FinishReason) -> FinishReason:
    try:
        return _FINISHES_BACK[reason]
    except KeyError:
        raise errors.InvalidRequest(f"unknown finish reason {reason} on the wire", param="reason") from None


def key_to_wire(key: RequestKey) -> types_pb2.RequestKey:
    return types_pb2.RequestKey(id=key.id, attempt=key.attempt, choice=key.choice)


def key_from_wire(key: types_pb2.RequestKey) -> RequestKey:
    return RequestKey(key.id, key.attempt, key.choice)


def address_to_wire(address: WorkerAddress) -> types_pb2.WorkerRef:
    return types_pb2.WorkerRef(id=address.id, incarnation=address.incarnation, grpc_address=address.grpc_address)


def address_from_wire(ref: types_pb2.WorkerRef) -> WorkerAddress:
    return WorkerAddress(ref.id, ref.incarnation, ref.grpc_address)


def error_to_wire(error: errors.TandemError) -> types_pb2.ErrorDetail:
    return types_pb2.ErrorDetail(
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        retry_after_s=error.retry_after_s,
        hint=error.hint,
    )


def error_from_wire(detail: types_pb2.ErrorDetail) -> errors.TandemError:
    """An unknown code (a newer peer's) becomes InternalError."""
    return errors.from_code(detail.code, detail.message, retry_after_s=detail.retry_after_s)


def structured_output_to_wire(output: StructuredOutput) -> types_pb2.StructuredOutput:
    if output.json_schema is not None:
        return types_pb2.StructuredOutput(json_schema=output.json_schema)
    if output.regex is not None:
        return types_pb2.StructuredOutput(regex=output.regex)
    if output.grammar is not None:
        return types_pb2.StructuredOutput(grammar=output.grammar)
    return types_pb2.StructuredOutput(json_object=output.json_object)


def structured_output_from_wire(output: types_pb2.StructuredOutput) -> StructuredOutput:
    kind = output.WhichOneof("kind")
    if kind == "json_schema":
        return StructuredOutput(json_schema=output.json_schema)
    if kind == "regex":
        return StructuredOutput(regex=output.regex)
    if kind == "grammar":
        return StructuredOutput(grammar=output.grammar)
    if kind == "json_object":
        return StructuredOutput(json_object=output.json_object)
    raise errors.InvalidRequest("structured output of an unknown kind on the wire", param="structured_output")


def sampling_to_wire(sampling: SamplingParams) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        structured_output=(
            None if sampling.structured_output is None else structured_output_to_wire(sampling.structured_output)
        ),
    )


def sampling_from_wire(sampling: types_pb2.SamplingParams) -> SamplingParams:
    """``logit_bias`` comes back sorted by token id: a map on the wire has no order."""
    has = sampling.HasField
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed if has("seed") else None,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=tuple(sampling.stop_token_ids),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=tuple(sorted(sampling.logit_bias.items())) if sampling.logit_bias else (),
        logprobs=sampling.logprobs if has("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if has("prompt_logprobs") else None,
        structured_output=(
            structured_output_from_wire(sampling.structured_output) if has("structured_output") else None
        ),
    )


def request_from_wire(submit: bus_pb2.Submit, *, now: float) -> Request:
    """What the scheduler sees of a Submit that arrives at ``now`` by the scheduler's clock."""
    waited_s = submit.waited_ms / 1e3
    slo_ms, avoid = submit.ttft_slo_ms, submit.avoid_workers  # each look at a message makes its value anew
    return Request(
        key=key_from_wire(submit.key),
        model=submit.model,
        isl_tokens=submit.isl_tokens,
        max_osl_tokens=submit.sampling.max_tokens,
        arrival_s=now - waited_s,
        timeout_s=waited_s + submit.timeout_ms / 1e3,
        tenant=submit.tenant,
        request_class=submit.request_class,
        ttft_slo_s=slo_ms / 1e3 if slo_ms else None,
        lora=submit.lora,
        avoid_workers=frozenset(avoid) if avoid else _NOBODY,
        local_only=submit.local_only,
    )


def spec_to_wire(spec: WorkerSpec) -> bus_pb2.WorkerInfo:
    return bus_pb2.WorkerInfo(
        ref=address_to_wire(spec.address),
        model=spec.model,
        role=role_to_wire(spec.role),
        slot=spec.slot,
        block_size=spec.block_size,
        dtype=spec.dtype,
        kv_layout=spec.kv_layout,
        engine=spec.engine,
        engine_version=spec.engine_version,
        wire_version=spec.wire_version,
        max_model_len=spec.max_model_len,
        kv_blocks_total=spec.kv_blocks_total,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        max_batched_tokens=spec.max_batched_tokens,
        max_num_seqs=spec.max_num_seqs,
        perf_profile=spec.perf_profile,
        kv_endpoint=spec.kv_endpoint,
        link_bytes_per_s=spec.link_bytes_per_s,
        loras=sorted(spec.loras),
        pool=spec.pool,
        draining=spec.draining,
    )


def spec_from_wire(info: bus_pb2.WorkerInfo) -> WorkerSpec:
    return WorkerSpec(
        address=address_from_wire(info.ref),
        model=info.model,
        role=role_from_wire(info.role),
        slot=info.slot,
        block_size=info.block_size,
        dtype=info.dtype,
        kv_layout=info.kv_layout,
        engine=info.engine,
        engine_version=info.engine_version,
        wire_version=info.wire_version,
        max_model_len=info.max_model_len,
        kv_blocks_total=info.kv_blocks_total,
        kv_bytes_per_token=info.kv_bytes_per_token,
        max_batched_tokens=info.max_batched_tokens,
        max_num_seqs=info.max_num_seqs,
        perf_profile=info.perf_profile,
        kv_endpoint=info.kv_endpoint,
        link_bytes_per_s=info.link_bytes_per_s,
        loras=frozenset(info.loras),
        pool=info.pool,
        draining=info.draining,
    )


def step_to_wire(step: StepTiming) -> bus_pb2.StepTiming:
    return bus_pb2.StepTiming(
        duration_s=step.duration_s,
        prefill_tokens=step.prefill_tokens,
        prefill_context_tokens=step.prefill_context_tokens,
        decode_sequences=step.decode_sequences,
        kv_tokens=step.kv_tokens,
    )


def step_from_wire(step: bus_pb2.StepTiming) -> StepTiming:
    return StepTiming(
        duration_s=step.duration_s,
        prefill_tokens=step.prefill_tokens,
        prefill_context_tokens=step.prefill_context_tokens,
        decode_sequences=step.decode_sequences,
        kv_tokens=step.kv_tokens,
    )


def load_to_wire(load: WorkerLoad) -> bus_pb2.LoadReport:
    """The scheduler's part of a report. The worker adds what only it knows: model, address, counters, epoch."""
    report = bus_pb2.LoadReport(
        worker=types_pb2.WorkerRef(id=load.worker, incarnation=load.incarnation),
        draining=load.draining,
        waiting_requests=load.waiting_requests,
        running_requests=load.running_requests,
        pending_prefill_tokens=load.pending_prefill_tokens,
        pending_prefill_context_tokens=load.pending_prefill_context_tokens,
        kv_blocks_used=load.kv_blocks_used,
        kv_blocks_total=load.kv_blocks_total,
        kv_tokens=load.kv_tokens,
        last_step_age_s=load.last_step_age_s,
        step_timings=[step_to_wire(step) for step in load.steps],
    )
    if load.role is not None:
        report.role = role_to_wire(load.role)
    return report


def load_from_wire(report: bus_pb2.LoadReport) -> WorkerLoad:
    worker, role = report.worker, report.role
    return WorkerLoad(
        worker=worker.id,
        incarnation=worker.incarnation,
        waiting_requests=report.waiting_requests,
        running_requests=report.running_requests,
        pending_prefill_tokens=report.pending_prefill_tokens,
        pending_prefill_context_tokens=report.pending_prefill_context_tokens,
        kv_blocks_used=report.kv_blocks_used,
        kv_blocks_total=report.kv_blocks_total,
        kv_tokens=report.kv_tokens,
        last_step_age_s=report.last_step_age_s,
        steps=tuple([step_from_wire(step) for step in report.step_timings]),
        draining=report.draining,
        role=role_from_wire(role) if role else None,
    )
