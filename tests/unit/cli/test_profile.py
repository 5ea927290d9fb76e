"""`tandem profile` on the simulated engine finds the profile by which that runs; the file is one that others take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.adapters import timing
from tandem.adapters.deployment import Pool, PoolRole
from tandem.cli.main import dispatch
from tandem.core.profiles import PROFILES
from tandem.errors import ConfigError
from tandem.wire import profile_file

QUICK = ("--repeat", "2", "--prompts", "64,600,2048", "--contexts", "64,1024", "--batches", "1,4,16", "--quiet")


def test_the_simulated_engine_is_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.json"
    assert dispatch(["profile", "--engine", "sim", "-o", str(file), *QUICK]) == 0
    out = capsys.readouterr().out
    assert "prompt tokens after" in out and "mean residual" in out
    found = profile_file.load(file)
    true = PROFILES["sim-h100-llama-8b-tp1"]
    assert found.profile.p1 == pytest.approx(true.p1, rel=0.3)
    assert found.profile.d0 == pytest.approx(true.d0, rel=0.5), "sleeps of a busy machine are late"
    assert found.worker.max_batched_tokens == 2048
    assert dispatch(["sim", "--hardware", str(file), "--requests", "50", "--rate", "5", "--quiet"]) == 0
    assert timing.of_pool(Pool(role=PoolRole.DECODE, profile=str(file))) == found.profile


@pytest.mark.parametrize("words", [("--repeat", "0"), ("--pool", "x"), ("--model", "y"), ("-f", "/nowhere")])
def test_a_mistake_is_named(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["profile", "--engine", "sim", *words]) == 2
    assert capsys.readouterr().err.startswith("error:")


@pytest.mark.parametrize("change", [{"version": 9}, {"profile": None}, {"terms": 0}])
def test_a_wrong_file_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    kind = profile_file.Kind("vllm", "1", "m", "bfloat16", 32, 500, 23040, 256, 32, 4096, 1e9)
    content = json.loads(profile_file.dump(profile_file.ProfileFile(PROFILES["cpu-smollm2"], kind)))
    if "terms" in change:
        content["profile"]["p1"] = 0
    else:
        content |= change
    file = tmp_path / "p.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="timing profile"):
        profile_file.load(file)
    with pytest.raises(ConfigError, match="no timing profile"):
        timing.of_pool(Pool(role=PoolRole.DECODE, profile="h900"))
