"""A small round of coverage-guided fuzzing; `make fuzz` does many more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("target", ["parsers", "bodies"])
def test_nothing_found_by_guided_inputs_fails(target: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.guided", "--target", target, "--runs", "3000"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=110)
    assert done.returncode == 0, done.stderr[-4000:].decode(errors="replace")
    assert b"Done 3000 runs" in done.stderr
