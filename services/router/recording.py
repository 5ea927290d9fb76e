"""The scheduler with a record of every call, for `tandem sim --record`. Off unless asked for; see wire/record.py.

A recording can be decided again only from its beginning, so a file that has reached its bound ends there; so does one
that cannot be written. Neither disturbs the router.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tandem.core.effects import Effect
from tandem.core.policy import Policy, RequestClass, Tenant
from tandem.core.profiles import Profile
from tandem.core.scheduler import Scheduler
from tandem.core.types import Request, RequestKey, WorkerLoad, WorkerSpec
from tandem.errors import ConfigError, TandemError
from tandem.wire import record

log = logging.getLogger(__name__)

FLUSH_S = 1.0
#: Recordings of one router and model that are kept, the newest ones.
KEPT = 4


class Recording:
    """One file of at most ``max_bytes``."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """ConfigError if it cannot be made."""
        self.path = path
        self._left = max_bytes
        self._flushed_at = 0.0
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = path.open("xb", buffering=1 << 16)
        except OSError as error:
            raise ConfigError(f"cannot record into {path}: {error.strerror or error}", param="record") from None

    def write(self, line: record.Call) -> None:
        if self._file.closed:
            return
        data = record.encode(line)
        self._left -= len(data)
        if self._left < 0:
            log.warning("recording %s has reached its bound and ends here", self.path)
            return self.close()
        try:
            self._file.write(data)
            if line.at - self._flushed_at >= FLUSH_S:
                self._flushed_at = line.at
                self._file.flush()
        except OSError as error:
            log.error("recording %s ends: %s", self.path, error)
            self.close()

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            log.error("recording %s is not whole: %s", self.path, error)


def recording_for(folder: Path, model: str, instance: str, started_ms: int, max_bytes: int) -> Recording:
    """A file of this router's and model's own; of their older ones the newest stay. ConfigError as ``Recording``.

    ``instance``: the router's lasting name. Those without one, whose names are new at each start, count as one."""
    stem = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", name) for name in (instance or "router", model))
    # Times in milliseconds have as many digits for the next 200 years: names sort by age.
    for old in sorted(folder.glob(f"{stem}-[0-9]*.jsonl"))[: 1 - KEPT]:
        old.unlink(missing_ok=True)
    return Recording(folder / f"{stem}-{started_ms}.jsonl", max_bytes)


class RecordingScheduler(Scheduler):
    """Decides what ``Scheduler`` decides. Calls that the scheduler makes to itself are not recorded: whoever decides
    again makes them, too."""

    def __init__(
        self,
        policy: Policy,
        *,
        classes: Mapping[str, RequestClass],
        tenants: Mapping[str, Tenant],
        seed: int,
        profiles: Mapping[str, Profile],
        recording: Recording,
        model: str,
        router: str,
        now: float,
    ) -> None:
        super().__init__(policy, classes=classes, tenants=tenants, rng=random.Random(seed), profiles=profiles)
        self._recording = recording
        self._depth = 0
        recording.write(
            record.Begin(now, record.VERSION, model, router, seed, policy, dict(classes), dict(tenants), dict(profiles))
        )

    @contextmanager
    def _call(self) -> Iterator[Callable[[record.Call], None]]:
        self._depth += 1
        try:
            yield self._recording.write if self._depth == 1 else _ignore
        finally:
            self._depth -= 1

    def reconfigure(
        self, policy: Policy, *, classes: Mapping[str, RequestClass], tenants: Mapping[str, Tenant], now: float
    ) -> None:
        with self._call() as note:
            note(record.Reconfigured(now, policy, dict(classes), dict(tenants)))
            super().reconfigure(policy, classes=classes, tenants=tenants, now=now)

    def worker_up(self, spec: WorkerSpec, now: float) -> list[RequestKey]:
        with self._call() as note:
            lost = super().worker_up(spec, now)
            note(record.WorkerUp(now, spec, tuple(lost)))
        return lost

    def worker_load(self, load: WorkerLoad, now: float) -> None:
        with self._call() as note:
            note(record.WorkerReport(now, load))
            super().worker_load(load, now)

    def worker_suspect(self, worker: str, suspect: bool, now: float) -> None:
        with self._call() as note:
            note(record.WorkerSuspect(now, worker, suspect))
            super().worker_suspect(worker, suspect, now)

    def worker_down(self, worker: str, incarnation: int, now: float) -> list[RequestKey]:
        with self._call() as note:
            lost = super().worker_down(worker, incarnation, now)
            note(record.WorkerDown(now, worker, incarnation, tuple(lost)))
        return lost

    def submit(self, request: Request, cached: Mapping[str, int], now: float) -> None:
        refused = ""
        with self._call() as note:
            try:
                super().submit(request, cached, now)
            except TandemError as error:
                refused = error.code
                raise
            finally:
                note(record.Submitted(now, request, dict(cached), refused))

    def prefill_done(self, key: RequestKey, now: float) -> None:
        with self._call() as note:
            note(record.PrefillDone(now, key))
            super().prefill_done(key, now)

    def decode_started(self, key: RequestKey, now: float) -> None:
        with self._call() as note:
            note(record.DecodeStarted(now, key))
            super().decode_started(key, now)

    def finished(self, key: RequestKey, output_tokens: int, cached_tokens: int, now: float) -> None:
        with self._call() as note:
            note(record.Finished(now, key, output_tokens, cached_tokens))
            super().finished(key, output_tokens, cached_tokens, now)

    def failed(self, key: RequestKey, now: float) -> None:
        with self._call() as note:
            note(record.Failed(now, key))
            super().failed(key, now)

    def abort(self, request_id: str, max_attempt: int, now: float, *, choice: int | None = None) -> list[RequestKey]:
        with self._call() as note:
            ended = super().abort(request_id, max_attempt, now, choice=choice)
            note(record.Aborted(now, request_id, max_attempt, choice, tuple(ended)))
        return ended

    def restore_counters(self, counters: Mapping[str, float]) -> None:
        with self._call() as note:
            note(record.Restored(0.0, dict(counters)))
            super().restore_counters(counters)

    def poll(self, now: float) -> list[Effect]:
        with self._call() as note:
            effects = super().poll(now)
            note(record.Polled(now, tuple(record.decision(effect) for effect in effects)))
        return effects


def _ignore(line: record.Call) -> None:
    return
