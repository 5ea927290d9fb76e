"""Every fault of every process under load, and what becomes of the requests.

For each case: 32 streams, new requests all the time, one fault in their midst; when what was harmed is back, all of
them have ended, and nothing is left behind. Asserted on the requests' own record, see tests.faults.verdict.

    python -m tests.faults.matrix --engine sim
    python -m tests.faults.matrix --engine vllm --only "decode worker"
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.adapters.bus import Message
from tandem.adapters.nats_bus import NatsBus
from tandem.v1 import bus_pb2
from tandem.wire import subjects
from tests.faults.cases import CASES, Case, Fault, Harm, Store, heal
from tests.faults.recorded import recorded_answers, tie
from tests.faults.verdict import HEAD, Record, problems, row
from tests.harness.answers import MODEL, Answers, SimAnswers
from tests.harness.client import flush
from tests.harness.load import Load
from tests.harness.site import Site, deployment


@dataclass(frozen=True)
class Scale:
    """How much load, and how patient we are with the machine."""

    streams: int
    #: Enough that they outlast the fault.
    tokens: int
    every_s: float
    new_tokens: int
    isl: tuple[int, int]
    start_s: float
    #: After everything is back.
    end_s: float
    step_s: float = 0.03


SCALES = {
    #: In CI: as many streams, for less long.
    "small": Scale(32, 120, 0.2, 20, (40, 400), 90.0, 60.0),
    "small vllm": Scale(12, 48, 1.0, 8, (40, 150), 600.0, 240.0),
    "sim": Scale(32, 200, 0.1, 20, (40, 400), 90.0, 30.0),
    "vllm": Scale(32, 96, 1.0, 8, (40, 200), 600.0, 180.0),
}


class Arena:
    """A cluster that is harmed in one case after another."""

    def __init__(self, site: Site, store: Store, bus: NatsBus, answers: Answers, scale: Scale) -> None:
        self.site = site
        self.answers = answers
        self._store = store
        self._scale = scale
        self._bus = bus
        self._stale = 0
        self._cases = 0

    async def listen(self) -> None:
        await self._bus.subscribe(subjects.events("default", MODEL), self._on_events)

    def _on_events(self, message: Message) -> None:
        events = bus_pb2.LifecycleEvents.FromString(message.data).events
        self._stale += sum(event.error_code == "stale_epoch" for event in events)

    async def run(self, case: Case) -> Record:
        site, scale = self.site, self._scale
        self._cases += 1
        for worker in site.workers():  # so that every prompt is computed, and every KV moved
            await asyncio.to_thread(flush, worker["grpc"])
        mark, stale = len(site.log()), self._stale
        harm = Harm(case, site, self._store)
        timeout_s = scale.end_s + 90.0
        async with Load(site.addresses, self.answers, seed=self._cases, timeout_s=timeout_s, http_every=4) as load:
            running = load.start(scale.streams, scale.tokens, isl=scale.isl)
            await load.flowing(running, scale.end_s)
            await asyncio.to_thread(harm.choose)
            record = Record(case, running, [], 0.0, 0.0, await asyncio.to_thread(harm.streams_on_victim))
            arriving = asyncio.create_task(load.arrive(scale.every_s, scale.new_tokens, isl=scale.isl))
            try:
                record.fault_at = time.monotonic()
                await harm.do()
                record.over_at = time.monotonic() if case.fault is Fault.PAUSE else record.fault_at
                await harm.healed()
                await asyncio.sleep(max(1.0, 3 * scale.every_s))
            finally:
                arriving.cancel()
                await heal(site, self._store)
            record.hanging = len(await load.ended(scale.end_s))
            record.arrived = load.streams[scale.streams :]
        log = site.log()[mark:]
        record.declared_dead = site.declared_dead(mark)
        record.stepped_down = re.findall(r"leadership: .*stepping down.*", log)
        record.stale_epochs = self._stale - stale
        await self._settle(record)
        return record

    async def _settle(self, record: Record) -> None:
        try:
            await asyncio.to_thread(self.site.settled, self._scale.end_s)
        except AssertionError as error:
            record.not_settled = str(error)
        for stream in record.streams:
            if stream.differs_at is not None and await tie(self.site, self.answers, stream):
                record.ties += 1
                stream.wrong, stream.complete = "", stream.error is None


@asynccontextmanager
async def entered(site: Site, store: Store, answers: Answers, scale: Scale) -> AsyncIterator[Arena]:
    """A cluster that is up."""
    bus = await NatsBus.connect(str(site.state()["nats_url"]), name="matrix")
    try:
        made = Arena(site, store, bus, answers, scale)
        await made.listen()
        yield made
    finally:
        await bus.close()


@asynccontextmanager
async def arena(engine: str, routers: int, folder: Path, scale: Scale, answers: Answers | None) -> AsyncIterator[Arena]:
    """``answers`` None: this cluster answers every prompt once before anybody harms it."""
    async with Store(folder / "redis") as store:
        site = Site(
            deployment(engine=engine, routers=routers, step_s=scale.step_s), folder, env={"TANDEM_REDIS_URL": store.url}
        )
        await asyncio.to_thread(site.start, scale.start_s)
        try:
            known = answers or await asyncio.to_thread(recorded_answers, site, scale.tokens, scale.isl)
            async with entered(site, store, known, scale) as made:
                yield made
        finally:
            site.resume_all()
            await asyncio.to_thread(site.stop)


async def matrix(engine: str, cases: Sequence[Case], folder: Path) -> list[tuple[Record, list[str]]]:
    answers: Answers | None = SimAnswers() if engine == "sim" else None
    done = []
    print(HEAD, flush=True)
    for routers in (1, 2):
        chosen = [case for case in cases if case.target.routers == routers]
        if not chosen:
            continue
        async with arena(engine, routers, folder / str(routers), SCALES[engine], answers) as made:
            answers = made.answers
            for case in chosen:
                record = await made.run(case)
                found = problems(record)
                print(row(record, found), flush=True)
                if found:
                    (folder / f"{case.target.name}-{case.fault.name}.log").write_text(made.site.log())
                done.append((record, found))
    return done


def write_into(path: Path, engine: str, rows: Sequence[str]) -> None:
    """Between the page's markers for that engine; rows of other cases stay."""
    begin, end = f"<!-- faults on {engine} -->\n", f"<!-- end of faults on {engine} -->\n"
    before, _, rest = path.read_text().partition(begin)
    old, _, after = rest.partition(end)
    by_case = {_case_of(line): line for line in [*old.splitlines(), *rows] if line.startswith("| ")}
    table = "\n".join(by_case[case.name] for case in CASES if case.name in by_case)
    path.write_text(f"{before}{begin}{HEAD}\n{table}\n{end}{after}")


def _case_of(line: str) -> str:
    return line.removeprefix("| ").partition(" |")[0].partition(" (")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--page", type=Path, help="also put the table into this page")
    parser.add_argument("--keep", type=Path, help="folder for the cluster's log where a case failed")
    args = parser.parse_args()
    cases = [case for case in CASES if re.search(args.only, case.name, re.IGNORECASE)]
    if not cases:
        parser.error(f"no case has {args.only!r}; there are: {'; '.join(case.name for case in CASES)}")
    with tempfile.TemporaryDirectory(prefix="tandem-faults-") as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        done = asyncio.run(matrix(args.engine, cases, folder))
    if args.page:
        write_into(args.page, args.engine, [row(record, found) for record, found in done])
    bad = [record.case.name for record, found in done if found]
    print(f"{len(done) - len(bad)} of {len(done)} cases hold" + (f"; not: {'; '.join(bad)}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
