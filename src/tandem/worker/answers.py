"""What a worker says about a request at its end, made from what it knows of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from operator import sub

from tandem.core.types import FinishReason
from tandem.engine.protocol import EngineOutput, Logprob
from tandem.errors import TandemError
from tandem.v1 import bus_pb2, types_pb2
from tandem.wire import codec
from tandem.worker.request_table import Running


def error_finish(rid: int, error: TandemError) -> bus_pb2.Finish:
    return bus_pb2.Finish(rid=rid, reason=types_pb2.FINISH_REASON_ERROR, error=codec.error_to_wire(error))


def abort_finish(rid: int) -> bus_pb2.Finish:
    return bus_pb2.Finish(rid=rid, reason=codec.finish_to_wire(FinishReason.ABORT))


def end_phase(running: Running) -> bus_pb2.Phase:
    """Of a request that has ended on this worker."""
    assert running.finish is not None
    if running.handed_over:
        return bus_pb2.PHASE_PREFILL_DONE
    if running.finish.reason == types_pb2.FINISH_REASON_ABORT:
        return bus_pb2.PHASE_ABORTED
    if running.finish.reason == types_pb2.FINISH_REASON_ERROR:
        return bus_pb2.PHASE_FAILED
    return bus_pb2.PHASE_FINISHED


def add_timings(running: Running, worker: str) -> None:
    """To its answer: durations of the decode worker's part, beside what the prefill worker told."""
    timings, times = running.timings, running.token_times
    timings.decode_worker = worker
    local = running.leg == bus_pb2.LEG_LOCAL
    if local:
        timings.cached_tokens = running.cached_tokens
        timings.computed_tokens = running.isl_tokens - running.cached_tokens
    if times:
        if local:
            timings.prefill_s = times[0] - running.accepted_at
        timings.decode_s = times[-1] - times[0]
        gaps = sorted(map(sub, times[1:], times))
        if gaps:
            timings.itl_p50_s = gaps[len(gaps) // 2]
            timings.itl_p99_s = gaps[int(len(gaps) * 0.99)]


def logprobs_update(running: Running, output: EngineOutput) -> bus_pb2.LogprobsUpdate:
    def position(candidates: Sequence[Logprob] | None) -> types_pb2.PositionLogprobs:
        tokens = [types_pb2.TokenLogprob(token_id=t, logprob=p, rank=r) for t, p, r in candidates or ()]
        return types_pb2.PositionLogprobs(tokens=tokens)

    return bus_pb2.LogprobsUpdate(
        rid=running.rid,
        seq=len(running.tokens),
        positions=[position(c) for c in output.logprobs or ()],
        prompt_positions=[position(c) for c in output.prompt_logprobs or ()],
    )
