"""What must hold for every case, judged on the requests' own record; and how it is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.cases import Case, Fault, Target
from tests.harness.load import Stream

#: A request that fails says so within this long after the fault began, or after it was sent.
ERROR_WITHIN_S = 5.0


@dataclass
class Record:
    """Of one case."""

    case: Case
    #: Those that streamed when the fault began, and those that came after.
    running: Sequence[Stream]
    arrived: Sequence[Stream]
    fault_at: float
    #: When what was paused ran again; else as ``fault_at``.
    over_at: float
    on_victim: int = 0
    hanging: int = 0
    #: Lines in which a router gave a worker up, or stepped down.
    declared_dead: Sequence[str] = ()
    stepped_down: Sequence[str] = ()
    stale_epochs: int = 0
    ties: int = 0
    not_settled: str = ""

    @property
    def streams(self) -> list[Stream]:
        return [*self.running, *self.arrived]

    @property
    def failed(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.error is not None]

    @property
    def slowest_error_s(self) -> float:
        """A frontend that stands still cannot say anything."""
        since = self.over_at if self.case.target is Target.FRONTEND else self.fault_at
        return max((stream.ended_s - max(stream.began_s, since) for stream in self.failed), default=0.0)

    @property
    def longest_gap_s(self) -> float:
        """Silence within a stream that went on."""
        return max((stream.longest_gap_s for stream in self.streams if stream.complete), default=0.0)

    @property
    def serves_again_s(self) -> float | None:
        """From the beginning of the fault to the end of the first request that came after it and completed."""
        ends = [stream.ended_s for stream in self.arrived if stream.complete]
        return min(ends) - self.fault_at if ends else None


def problems(record: Record, *, error_within_s: float = ERROR_WITHIN_S) -> list[str]:
    """Empty = everything holds."""
    case, found = record.case, []
    if record.hanging:
        found.append(f"{record.hanging} requests hang")
    found += sorted({f"wrong: {stream.wrong}" for stream in record.streams if stream.wrong})
    for stream in record.failed:
        assert stream.error is not None
        if not stream.typed and case.target is not Target.FRONTEND:
            found.append(f"an error without a type: {stream.error}")
        elif not stream.error.retryable:
            found.append(f"an error that is final: {stream.error.code}: {stream.error}")
    if record.slowest_error_s > error_within_s:
        found.append(f"an error came only after {record.slowest_error_s:.1f} s")
    if record.serves_again_s is None:
        found.append("nothing that came after the fault was served")
    found += _of_the_cluster(record)
    return list(dict.fromkeys(found))


def _of_the_cluster(record: Record) -> list[str]:
    case, found = record.case, []
    if record.declared_dead and not case.target.is_worker:
        found.append(f"declared dead: {record.declared_dead}")
    if record.stepped_down and case.target.routers == 1:
        found.append(f"a leader stepped down: {record.stepped_down}")
    # Who was paused while another was elected is refused, rightly, until it has heard of it.
    if record.stale_epochs and (case.target, case.fault) != (Target.LEADER, Fault.PAUSE):
        found.append(f"{record.stale_epochs} refusals for an old epoch")
    if case.target is Target.DECODE:
        lost = [stream for stream in record.running if not stream.complete]
        if lost:
            found.append(f"{len(lost)} plain streams did not go on by migration")
        if not record.on_victim:
            found.append("no stream was on the worker")
    if case == Case(Target.FRONTEND, Fault.RESTART) and (cut := [s for s in record.running if not s.complete]):
        found.append(f"{len(cut)} streams were cut off by a frontend that was told to leave")
    if record.not_settled:
        found.append(record.not_settled)
    return found


HEAD = (
    "| case | running | arriving | errors | slowest error | longest gap | serves again after | |\n"
    "|---|---:|---:|---|---:|---:|---:|---|"
)


def row(record: Record, found: Sequence[str]) -> str:
    again = record.serves_again_s
    errors = Counter(stream.error.code for stream in record.failed if stream.error is not None)
    cells = [
        record.case.name + (f" ({record.on_victim} streams on it)" if record.on_victim else ""),
        _share(record.running),
        _share(record.arrived),
        ", ".join(f"{count} {code}" for code, count in sorted(errors.items())) or "none",
        f"{record.slowest_error_s:.1f} s" if errors else "",
        f"{record.longest_gap_s:.1f} s",
        "never" if again is None else f"{again:.1f} s",
        "**" + "; ".join(found) + "**" if found else "ok" + (f", {record.ties} ties" if record.ties else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _share(streams: Sequence[Stream]) -> str:
    done = sum(stream.complete for stream in streams)
    return f"{done} of {len(streams)} ({100 * done / max(1, len(streams)):.0f} %)"
