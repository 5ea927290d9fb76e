"""Trace files of two formats, and the synthetic shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.errors import ConfigError
from tandem.sim import traces
from tandem.sim.synthetic import GENERATORS, generate
from tandem.sim.workload import Chains


def mooncake(path: Path, rows: list[tuple[int, int, int, list[int]]]) -> Path:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows) + "\n")
    return path


def test_mooncake_by_content(tmp_path: Path) -> None:
    rows = [(3000, 1100, 5, [1, 2, 9]), (0, 1024, 7, [1, 2]), (3000, 600, 1, [4, 5]), (6000, 512, 1, [2])]
    workload = traces.load(mooncake(tmp_path / "a.txt", rows), seed=3)
    assert [r.isl_tokens for r in workload.requests if r.arrival_s < 3.0] == [1024]
    by_isl = {r.isl_tokens: r for r in workload.requests}
    first, longer = by_isl[1024], by_isl[1100]
    assert longer.hashes == first.hashes and len(first.hashes) == 2, "the partial block is not reusable"
    assert by_isl[512].hashes != first.hashes[1:], "the same id after another parent is another block"
    assert all(3.0 <= by_isl[isl].arrival_s < 6.0 for isl in (1100, 600)), "spread inside their bin"
    assert traces.load(tmp_path / "a.txt", seed=3) == workload
    assert traces.load(tmp_path / "a.txt", seed=4) != workload


def test_azure_by_content(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(
        b"\xef\xbb\xbfTIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        b"2023-11-16 18:17:04.0319600,3180,8\r\n2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:05,7,0\r\n"
    )
    workload = traces.load(path)
    assert [(r.isl_tokens, r.osl_tokens) for r in workload.requests] == [(4808, 10), (3180, 8), (7, 1)]
    assert workload.requests[0].arrival_s == 0.0
    assert workload.requests[1].arrival_s == pytest.approx(0.052, abs=1e-5)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b'{"timestamp": 1}\n', b"\xff\xfe", b"{nonsense\n"])
def test_other_files_are_a_config_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        traces.load(path)
    with pytest.raises(ConfigError):
        traces.load(tmp_path / "no such file")


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_synthetic_workloads_are_seeded_and_well_formed(name: str) -> None:
    workload = generate(name, 1, 300, 5.0)
    assert workload == generate(name, 1, 300, 5.0) != generate(name, 2, 300, 5.0)
    assert len(workload.requests) == 300 and workload.rate == pytest.approx(5.0)
    arrivals = [r.arrival_s for r in workload.requests]
    assert arrivals == sorted(arrivals)
    parents: dict[int, int] = {}
    for r in workload.requests:
        assert r.isl_tokens >= 1 and r.osl_tokens >= 1
        assert len(r.hashes) <= (r.isl_tokens + r.osl_tokens) // workload.block_size
        for parent, block in zip((0, *r.hashes), r.hashes, strict=False):
            assert parents.setdefault(block, parent) == parent, "hashes are chained"


def test_no_such_generator() -> None:
    with pytest.raises(ConfigError):
        generate("nothing", 1)


def test_chains_tell_prefixes_apart() -> None:
    chains = Chains()
    a, b = list(chains.chain("xyz")), list(chains.chain("yz"))
    assert a == list(chains.chain("xyz")) and not set(a) & set(b)
