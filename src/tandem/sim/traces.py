"""Loads request traces by their format, whatever the file is called.

* Mooncake JSONL: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` (one id a block, chained;
  the last, partial block is not reusable). Arrivals there are quantised: they are spread inside their bin, seeded.
* Azure LLM inference CSV: ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``; nothing is known to be shared.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from tandem.errors import ConfigError
from tandem.sim.workload import Chains, Offered, Workload

#: Block size for traces that say nothing about blocks.
_PLAIN_BLOCK = 64
_AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def load(path: Path, seed: int = 0, block_size: int = 512) -> Workload:
    """ConfigError if the file is neither. ``block_size``: of the hash ids (Mooncake's own traces use 512)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in file.read().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path}: {error}", param="trace") from error
    if not lines:
        raise ConfigError(f"trace {path} is empty", param="trace")
    try:
        if lines[0].lstrip().startswith("{"):
            return Workload(path.stem, block_size, _mooncake(lines, seed, block_size))
        if all(name in lines[0] for name in _AZURE_FIELDS):
            return Workload(path.stem, _PLAIN_BLOCK, _azure(lines))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"trace {path}: {error!r}", param="trace") from error
    raise ConfigError(f"trace {path} is neither Mooncake JSONL nor Azure CSV", param="trace")


def _mooncake(lines: Iterable[str], seed: int, block_size: int) -> tuple[Offered, ...]:
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["timestamp"])
    arrivals = _spread([row["timestamp"] / 1e3 for row in rows], random.Random(seed))
    chains = Chains()
    requests = []
    for arrival, row in zip(arrivals, rows, strict=True):
        isl = max(1, int(row["input_length"]))
        hashes = tuple(chains.chain(row.get("hash_ids", ())[: isl // block_size]))
        requests.append(Offered(arrival, isl, max(1, int(row["output_length"])), hashes))
    return tuple(sorted(requests, key=lambda request: request.arrival_s))


def _spread(times: Sequence[float], rng: random.Random) -> list[float]:
    """Arrivals that share a timestamp, spread evenly at random up to the next timestamp."""
    stamps = sorted(set(times))
    after = dict(zip(stamps, [*stamps[1:], stamps[-1]], strict=True))
    shared = len(stamps) < len(times)
    return [t + rng.random() * (after[t] - t) if shared else t for t in times]


def _azure(lines: Sequence[str]) -> tuple[Offered, ...]:
    rows = []
    for row in csv.DictReader(lines):
        # Seven digits of a second are one more than datetime takes.
        whole, _, fraction = row["TIMESTAMP"].partition(".")
        at = datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")
        rows.append((at, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))))
    rows.sort(key=lambda row: row[0])
    return tuple(Offered(at - rows[0][0], isl, osl) for at, isl, osl in rows)
