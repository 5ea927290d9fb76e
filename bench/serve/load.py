"""Drives a server with the generator in load.c: prompts that nobody has seen before, and what came of them as figures.

Rates count requests that were answered whole. CPU per request is that of each process over the run, by the kernel's
count (10 ms ticks), divided by those requests.
"""

from __future__ import annotations

import array
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Tokens that SmolLM2's chat template adds to one message of words.
TEMPLATE_TOKENS = 30
#: A prompt's words are one token each.
_WORD = (3, 8)


@dataclass(frozen=True)
class Target:
    """A server under load. ``processes``: group -> ids of its processes."""

    port: int
    model: str
    processes: Mapping[str, Sequence[int]]
    headers: Sequence[str] = ()


@dataclass(frozen=True)
class Line:
    """A request: ``body``, ``delay_us`` after the start, or after the answer to line ``previous``."""

    body: str
    delay_us: int = 0
    previous: int = -1


@dataclass
class Run:
    """What one run of the generator gave. Times in milliseconds, CPU in milliseconds per request."""

    requests: int
    failed: int
    wall_s: float
    requests_per_s: float
    tokens_per_s: float
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    end_to_end_ms: dict[str, float]
    prompt_tokens: float
    output_tokens: float
    cached_share: float
    cpu_ms: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)
    #: Of the same engine by itself, just before (engine_alone.py); where only one request is under way at a time.
    engine_ttft_ms: dict[str, float] = field(default_factory=dict)
    generator_cores: float = 0.0
    #: Cores that everything else on this machine was using meanwhile.
    others_cores: float = 0.0


def words(tokenizer: Path) -> list[str]:
    """Plain English words that are one token each with the space before them."""
    vocabulary = json.loads(tokenizer.read_bytes())["model"]["vocab"]
    found = (token[1:] for token in vocabulary if token.startswith("Ġ"))
    low, high = _WORD
    return sorted(w for w in found if w.isascii() and w.isalpha() and w.islower() and low <= len(w) <= high)


def chat(model: str, messages: Sequence[Mapping[str, str]], osl: int, *, stream: bool = True) -> str:
    body: dict[str, object] = {"model": model, "messages": messages, "max_tokens": osl, "min_tokens": osl}
    body |= {"ignore_eos": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body)


def prompts(
    model: str, vocabulary: Sequence[str], *, isl: int, osl: int, count: int, seed: int, stream: bool, rate: float = 0.0
) -> list[Line]:
    """``count`` different prompts of ``isl`` tokens. ``rate``: arrivals of an open loop, requests/s, Poisson."""
    rng = random.Random(seed)
    lines, at = [], 0.0
    for _ in range(count):
        text = " " + " ".join(rng.choices(vocabulary, k=max(1, isl - TEMPLATE_TOKENS)))
        at += rng.expovariate(rate) if rate else 0.0
        lines.append(Line(chat(model, [{"role": "user", "content": text}], osl, stream=stream), int(at * 1e6)))
    return lines


class Generator:
    """The compiled load.c; ``folder`` is for its files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = folder / "load"
        source = Path(__file__).with_name("load.c")
        subprocess.run(["cc", "-O2", "-o", str(self._program), str(source)], check=True)

    def run(
        self,
        target: Target,
        lines: Iterable[Line],
        *,
        concurrency: int = 0,
        seconds: float = 600.0,
        quick_ack: bool = False,
    ) -> Run:
        """Closed loop at ``concurrency``; 0 = open loop, each line at its time."""
        requests = self._folder / "requests.tsv"
        with requests.open("w") as file:
            count = 0
            for line in lines:
                file.write(f"{line.previous}\t{line.delay_us}\t{line.body}\n")
                count += 1
        gaps = self._folder / "gaps"
        command = [str(self._program), str(target.port), "/v1/chat/completions", str(requests), "-g", str(gaps)]
        command += ["-c", str(concurrency), "-n", str(count)] if concurrency else ["-o"]
        command += ["-d", str(seconds), *(["-q"] if quick_ack else [])]
        for header in target.headers:
            command += ["-H", header]
        before = _Usage.read(target.processes)
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 120)
        after = _Usage.read(target.processes)
        run = _figures(done.stdout.splitlines(), gaps)
        after.since(before, run)
        return run


def _figures(output: Sequence[str], gaps: Path) -> Run:
    *rows, last = output
    wall_s = int(last.split()[1]) / 1e6
    table = [[int(value) for value in row.split("\t")] for row in rows]
    good = [row for row in table if row[1] == 200 and not row[2]]
    between = array.array("I")
    between.frombytes(gaps.read_bytes())
    tokens, prompt = sum(max(0, r[7]) for r in good), sum(max(0, r[8]) for r in good)
    count = max(1, len(good))
    return Run(
        requests=len(good),
        failed=len(table) - len(good),
        wall_s=wall_s,
        requests_per_s=len(good) / wall_s,
        tokens_per_s=tokens / wall_s,
        ttft_ms=_summary(row[4] / 1e3 for row in good if row[4] >= 0),
        itl_ms=_summary(gap / 1e3 for gap in between),
        end_to_end_ms=_summary(row[5] / 1e3 for row in good),
        prompt_tokens=prompt / count,
        output_tokens=tokens / count,
        cached_share=sum(max(0, row[9]) for row in good) / max(1, prompt),
    )


def _summary(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    found = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}
    return found | {"mean": statistics.fmean(ordered)}


@dataclass(frozen=True)
class _Usage:
    """CPU seconds and memory at one moment."""

    at: float
    busy_s: float
    generator_s: float
    cpu_s: Mapping[str, float]
    memory_mb: Mapping[str, float]

    @classmethod
    def read(cls, processes: Mapping[str, Sequence[int]]) -> _Usage:
        times = os.times()
        return cls(
            at=time.monotonic(),
            busy_s=machine_busy_s(),
            generator_s=times.children_user + times.children_system,
            cpu_s={group: sum(map(cpu_s, pids)) for group, pids in processes.items()},
            memory_mb={group: sum(map(memory_mb, pids)) for group, pids in processes.items()},
        )

    def since(self, before: _Usage, run: Run) -> None:
        wall = self.at - before.at
        used = {group: self.cpu_s[group] - before.cpu_s[group] for group in self.cpu_s}
        generator = self.generator_s - before.generator_s
        run.cpu_ms = {group: 1e3 * seconds / max(1, run.requests) for group, seconds in used.items()}
        run.memory_mb = dict(self.memory_mb)
        run.generator_cores = generator / wall
        run.others_cores = max(0.0, (self.busy_s - before.busy_s - generator - sum(used.values())) / wall)


_TICK = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    values = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(values[11]) + int(values[12])) / _TICK


def memory_mb(pid: int) -> float:
    """Resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def machine_busy_s() -> float:
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq) / _TICK


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tandem-bench-")
