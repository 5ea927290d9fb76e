"""What each worker is busy with, as the router knows it: its own placements, exactly, plus what others put there.

*Own* load changes by event only: ``book`` when a request is placed, ``prefill_done`` and ``release`` when a worker
says so. *Foreign* load is what load reports show beyond our own: requests of a former leader, or of nobody we know.

Reports are old (up to ``Policy.report_lag_s``) and carry no time that we could compare, so they are read with two
rules. A report may contain requests that we have since seen end: foreign load is what exceeds the *highest* own load
of the last ``lag`` seconds. A report may lack requests that we have since dispatched: it may lower the pending prefill
only down to what it says plus all that was dispatched within the last ``lag`` seconds. So nothing is counted twice,
a stale report erases nothing, and no number goes below zero.

Requests that share a prefix share its KV blocks, which the router cannot see: each is booked in full. A report that
shows fewer blocks in use than the prompts that were decoding all through the last ``lag`` seconds says which part is
shared; so much of the present ones needs no room.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from tandem.core.perf_model import PerfModel
from tandem.core.types import RequestKey, StepTiming, WorkerLoad, WorkerSpec

#: Share of the oldest prefill that elapsed time alone may count as done; the rest ends by event.
_MAX_PROGRESS = 0.95


class Booking:
    """What one request takes on one worker."""

    __slots__ = (
        "booked_s", "decodes", "decoding", "extra_s", "key", "kv_blocks", "kv_tokens", "prefill_context", "prefill_s",
        "prefill_tokens", "transfer_bytes",
    )  # fmt: skip

    def __init__(
        self,
        key: RequestKey,
        prefill_tokens: int,
        prefill_context: float,
        prefill_s: float,
        kv_blocks: int,
        decodes: bool,
        kv_tokens: int,
        transfer_bytes: float = 0.0,
        extra_s: float = 0.0,
    ) -> None:
        self.key = key
        self.prefill_tokens = prefill_tokens  # still to compute here; 0 once done, or if this worker only decodes
        self.prefill_context = prefill_context
        self.prefill_s = prefill_s  # predicted for these tokens alone
        self.kv_blocks = kv_blocks
        self.decodes = decodes  # takes a place in the decode batch
        self.kv_tokens = kv_tokens  # read per decode step: the prompt
        self.transfer_bytes = transfer_bytes  # still to cross this worker's link
        self.extra_s = extra_s  # of prefill_s, what it takes from the decodes beside it
        self.booked_s = 0.0
        self.decoding = False  # its prompt is in this worker's KV


#: Own load as a report could show it: prompt tokens to compute, KV blocks, requests, KV tokens at most; and, negative,
#: the blocks that it must show at least unless requests share some.
_Own = tuple[int, int, int, int, int]


class Reading:
    """A worker's pending prefill at one moment, own and foreign. Not inflated."""

    __slots__ = ("context", "pending_s", "step_s", "tokens")

    def __init__(self, tokens: float, context: float, step_s: float, pending_s: float) -> None:
        self.tokens = tokens  # prompt tokens still to compute
        self.context = context  # sum of the contexts before them
        self.step_s = step_s  # fixed cost of each engine step that computes prompt tokens, beside the present decodes
        self.pending_s = pending_s  # until all of it is computed


class _Peaks:
    """Highest values of the last one to two windows, in O(1)."""

    __slots__ = ("_bucket", "_current", "_previous", "_window")

    def __init__(self, window: float) -> None:
        self._window = window
        self._bucket = -1
        self._current = self._previous = (0, 0, 0, 0, 0)

    def note(self, values: _Own, now: float) -> None:
        bucket = math.floor(now / self._window)
        if bucket != self._bucket:
            self._previous = self._current if bucket == self._bucket + 1 else values
            self._current = values
            self._bucket = bucket
        elif values != self._current:
            self._current = _highest(self._current, values)

    def read(self, values: _Own, now: float) -> _Own:
        """``values`` are the present ones."""
        self.note(values, now)
        return _highest(self._current, self._previous)


def _highest(one: _Own, other: _Own) -> _Own:
    (a, b, c, d, e), (f, g, h, i, j) = one, other
    return (a if a > f else f, b if b > g else g, c if c > h else h, d if d > i else i, e if e > j else j)


#: Numbers of the KV formats that have been seen: placement compares these, since comparing the formats takes longer.
_KINDS: dict[tuple[str, str, int], int] = {}


class WorkerView:
    """One incarnation of a worker. Plain attributes are read by placement; only methods change them."""

    __slots__ = (
        "_dispatched", "_lag", "_peaks", "_prefilling", "_progress_from",
        "_reading", "_reading_at", "_recent_tokens", "_report", "_rho", "_rho_at", "block_size", "bookings",
        "capacity_tokens", "chunk_tokens", "decoding_blocks", "draining", "foreign_blocks", "foreign_context",
        "foreign_kv_tokens", "foreign_sequences", "foreign_tokens",
        "id", "kv_blocks_total", "kv_bytes_per_token", "kv_kind", "link_bytes_per_s", "max_num_seqs", "model",
        "own_blocks", "own_context", "own_kv_tokens", "own_sequences", "own_tokens", "perf", "role",
        "shared_blocks", "sharing", "spec", "suspect", "transfer_bytes", "worth",
    )  # fmt: skip

    def __init__(self, spec: WorkerSpec, perf: PerfModel, lag: float) -> None:
        self.id = spec.id
        self._describe(spec)
        #: Prompt and output tokens of one request that fit when the worker is idle.
        self.capacity_tokens = min(spec.max_model_len, spec.kv_blocks_total * spec.block_size)
        self.suspect = False
        self.perf = perf
        self.worth = 1.0  # of its time, beside the mean of the fleet
        self.bookings: dict[RequestKey, Booking] = {}
        self.own_tokens = 0
        self.own_context = 0.0
        self.own_blocks = 0
        self.own_sequences = 0
        self.own_kv_tokens = 0
        self.transfer_bytes = 0.0
        self.decoding_blocks = 0  # of prompts whose KV is here, each counted in full
        self.sharing = 0.0  # part of these that reports show to be shared between requests
        self.shared_blocks = 0  # that many of own_blocks need no room
        self.foreign_tokens = 0
        self.foreign_context = 0.0
        self.foreign_blocks = 0
        self.foreign_sequences = 0
        self.foreign_kv_tokens = 0
        self._lag = lag
        self._peaks = _Peaks(lag)
        self._prefilling: dict[RequestKey, None] = {}  # in dispatch order
        self._progress_from = 0.0
        self._dispatched: deque[tuple[float, int]] = deque()
        self._recent_tokens = 0
        self._report: WorkerLoad | None = None
        self._rho = 0.0
        self._rho_at = 0.0
        self._reading = Reading(0.0, 0.0, 0.0, 0.0)
        self._reading_at = -math.inf  # when it was taken; -inf = something has changed since

    def _describe(self, spec: WorkerSpec) -> None:
        """Takes out of ``spec`` what placement reads: here these are machine numbers, there they are not compiled."""
        self.spec = spec
        self.role = spec.role
        self.draining = spec.draining
        self.model = spec.model
        self.block_size = spec.block_size
        self.kv_blocks_total = spec.kv_blocks_total
        self.kv_bytes_per_token = spec.kv_bytes_per_token
        self.link_bytes_per_s = spec.link_bytes_per_s
        self.max_num_seqs = spec.max_num_seqs
        self.chunk_tokens = spec.max_batched_tokens
        kv_format = (spec.dtype, spec.kv_layout, spec.block_size)
        #: Workers of one kind can read each other's KV; -1 = its KV cannot leave, nor other KV come.
        self.kv_kind = _KINDS.setdefault(kv_format, len(_KINDS)) if spec.kv_endpoint else -1

    # --- events -----------------------------------------------------------------------------------------------------

    def book(self, booking: Booking, now: float, tau_s: float) -> None:
        """``tau_s``: time over which the prefill that disturbs this worker's decodes is averaged."""
        booking.booked_s = now
        self._reading_at = -math.inf
        self.bookings[booking.key] = booking
        self.own_blocks += booking.kv_blocks
        self.transfer_bytes += booking.transfer_bytes
        if booking.decodes:
            self.own_sequences += 1
            self.own_kv_tokens += booking.kv_tokens
        if booking.prefill_tokens:
            if not self._prefilling:
                self._progress_from = now
            self._prefilling[booking.key] = None
            self.own_tokens += booking.prefill_tokens
            self.own_context += booking.prefill_context
            self._dispatched.append((now, booking.prefill_tokens))
            self._recent_tokens += booking.prefill_tokens
            self._rho = self.prefill_share_s(now, tau_s) + booking.extra_s
            self._rho_at = now
        self._note_peaks(now)

    def prefill_done(self, key: RequestKey, now: float) -> None:
        """Credit returns. Unknown or repeated: no-op."""
        booking = self.bookings.get(key)
        if booking is None or not booking.prefill_tokens:
            return
        self._note_peaks(now)
        self._reading_at = -math.inf
        self.own_tokens -= booking.prefill_tokens
        self.own_context -= booking.prefill_context
        booking.prefill_tokens = 0
        booking.prefill_context = 0.0
        if next(iter(self._prefilling)) == key:
            self._progress_from = now
        del self._prefilling[key]
        self._decodes(booking)
        if not self._prefilling:
            self.own_context = 0.0  # sheds what float sums leave

    def transfer_done(self, key: RequestKey) -> None:
        booking = self.bookings.get(key)
        if booking is not None:
            self.transfer_bytes -= booking.transfer_bytes
            booking.transfer_bytes = 0.0
            self._decodes(booking)

    def _decodes(self, booking: Booking) -> None:
        if booking.decodes and not booking.decoding:
            booking.decoding = True
            self._change_decoding(booking.kv_tokens // self.block_size)

    def _change_decoding(self, blocks: int) -> None:
        self.decoding_blocks += blocks
        self.shared_blocks = int(self.sharing * self.decoding_blocks)

    def release(self, key: RequestKey, now: float) -> None:
        """Everything that this request takes here is given back. Unknown: no-op."""
        self.prefill_done(key, now)
        self.transfer_done(key)
        booking = self.bookings.pop(key, None)
        if booking is None:
            return
        self._note_peaks(now)
        self._reading_at = -math.inf
        self.own_blocks -= booking.kv_blocks
        if booking.decodes:
            self.own_sequences -= 1
            self.own_kv_tokens -= booking.kv_tokens
        if booking.decoding:
            self._change_decoding(-(booking.kv_tokens // self.block_size))
        if not self.bookings:
            self.transfer_bytes = 0.0

    def update(self, spec: WorkerSpec) -> None:
        """News (role, draining) of the same incarnation."""
        self._reading_at = -math.inf
        self._describe(spec)

    def report(self, load: WorkerLoad, now: float) -> None:
        self._report = load
        self._reading_at = -math.inf
        self.draining = load.draining
        if load.role is not None:
            self.role = load.role
        tokens, blocks, requests, kv_tokens, decoding = self._peaks.read(self._own(), now)
        self.foreign_tokens = max(0, load.pending_prefill_tokens - tokens)
        share = self.foreign_tokens / load.pending_prefill_tokens if load.pending_prefill_tokens else 0.0
        self.foreign_context = share * load.pending_prefill_context_tokens
        self.foreign_blocks = max(0, load.kv_blocks_used - blocks)
        self.sharing = max(0.0, 1.0 - load.kv_blocks_used / -decoding) if decoding < 0 else 0.0
        self._change_decoding(0)
        self.foreign_sequences = max(0, load.waiting_requests + load.running_requests - requests)
        self.foreign_kv_tokens = max(0, load.kv_tokens - kv_tokens)
        if not self.foreign_sequences:
            self.foreign_tokens = self.foreign_kv_tokens = 0
            self.foreign_context = 0.0
        while self._dispatched and self._dispatched[0][0] < now - self._lag:
            self._recent_tokens -= self._dispatched.popleft()[1]

    def learn(self, steps: Iterable[StepTiming]) -> None:
        """Timings of its engine steps, by its own clock."""
        self._reading_at = -math.inf
        self.perf.observe(steps)

    def finished_by_report(self, now: float) -> list[RequestKey]:
        """Bookings that the latest report contradicts: the worker is idle and they are older than any report's age.

        Lifecycle events travel best effort; this repairs what was lost. A booking that waits for a KV transfer, on
        either side of it, is no work of the engine and therefore never contradicted.
        """
        load = self._report
        if load is None or load.waiting_requests or load.running_requests or load.pending_prefill_tokens:
            return []
        before = now - 2.0 * self._lag
        return [
            b.key for b in self.bookings.values() if b.booked_s < before and (b.prefill_tokens or not b.transfer_bytes)
        ]

    # --- readings ---------------------------------------------------------------------------------------------------

    def reading(self, now: float) -> Reading:
        """What is pending and how fast it goes; kept until something changes or time goes on."""
        if self._reading_at != now:
            tokens, context = self._pending(now)
            perf, chunk = self.perf, self.chunk_tokens
            sequences = self.own_sequences + self.foreign_sequences
            step = perf.p0 + perf.p1 * sequences + perf.p3 * (self.own_kv_tokens + self.foreign_kv_tokens)
            pending = perf.p1 * tokens + perf.p2 * context + math.ceil(tokens / chunk) * step
            self._reading = Reading(tokens, context, step, pending)
            self._reading_at = now
        return self._reading

    def _pending(self, now: float) -> tuple[float, float]:
        tokens = float(self.own_tokens + self.foreign_tokens)
        context = self.own_context + self.foreign_context
        if self._prefilling:
            head = self.bookings[next(iter(self._prefilling))]
            if head.prefill_s > 0.0:
                done = min(_MAX_PROGRESS, max(0.0, now - self._progress_from) / head.prefill_s)
                tokens -= done * head.prefill_tokens
                context -= done * head.prefill_context
        if self._report is not None and tokens > 0:
            known = self._report.pending_prefill_tokens + self._recent_tokens
            if known < tokens:
                context *= known / tokens
                tokens = float(known)
        return (tokens, context) if tokens > 0 else (0.0, 0.0)

    def prefill_share_s(self, now: float, tau_s: float) -> float:
        """Seconds of prefill lately spent or pending here, decayed over ``tau_s``."""
        if self._rho == 0.0:
            return 0.0
        return self._rho * math.exp((self._rho_at - now) / tau_s)

    @property
    def blocks_in_use(self) -> int:
        return self.own_blocks - self.shared_blocks + self.foreign_blocks

    @property
    def sequences(self) -> int:
        return self.own_sequences + self.foreign_sequences

    @property
    def kv_tokens(self) -> int:
        """Prompt tokens that the decode batch reads (own) plus all that foreign requests read."""
        return self.own_kv_tokens + self.foreign_kv_tokens

    @property
    def foreign(self) -> tuple[int, int]:
        """(KV blocks, requests) that are not ours."""
        return self.foreign_blocks, self.foreign_sequences

    @property
    def idle(self) -> bool:
        return not self.bookings and not self.foreign_sequences

    @property
    def usable(self) -> bool:
        return not (self.draining or self.suspect)

    def _own(self) -> _Own:
        blocks = self.own_blocks
        return self.own_tokens, blocks, len(self.bookings), blocks * self.block_size, -self.decoding_blocks

    def _note_peaks(self, now: float) -> None:
        self._peaks.note(self._own(), now)
