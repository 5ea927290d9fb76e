"""Compiled or not, the core decides the same; and what is compiled is never of another text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem import compiled

RUN = """
import sys
from tandem.cli.main import main
from tandem.core import placement
print(placement.__file__, file=sys.stderr)
main("sim --workload bursty-code --requests 300 --rate 8 --fleet 2P2D --quiet --json -".split())
"""


def run(*options: str) -> tuple[str, str]:
    """The figures, and the file that placement came from."""
    done = subprocess.run(
        [sys.executable, *options, "-c", RUN], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, done.stderr.splitlines()[0]


def test_machine_code_decides_the_same() -> None:
    if not compiled.folder().is_dir():
        pytest.skip("nothing is compiled here: scripts/compile.py")
    figures, file = run()
    interpreted, source = run("-X", "tandem-interpreted")
    assert Path(source).suffix == ".py"
    assert Path(file).suffix == ".so"
    assert figures == interpreted
    assert json.JSONDecoder().raw_decode(figures)[0]


SPAWN = """
import subprocess
import sys
import tandem.core
child = f"import sys; sys.path[:] = {sys.path}; from tandem.core import placement, profiles; print(placement.__file__)"
subprocess.run([sys.executable, "-c", child], check=True)
"""


def test_spawned_processes_find_the_same_modules(tmp_path: Path) -> None:
    """Such as an engine's: they begin with their parent's sys.path, which comes before an editable install."""
    subprocess.run([sys.executable, "-c", SPAWN], cwd=tmp_path, timeout=60, check=True)


def test_an_edited_source_runs_as_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "tandem"
    (sources / "core").mkdir(parents=True)
    source = sources / "core" / "slo.py"
    source.write_text("LIMIT = 1")
    monkeypatch.setattr(compiled, "SOURCES", sources)
    monkeypatch.setattr(compiled, "STORE", tmp_path / "store")
    compiled.folder.cache_clear()
    try:
        made = compiled.folder()
        made.mkdir(parents=True)
        assert compiled.with_compiled("tandem.core", ["sources"]) == [
            str(made / "modules" / "tandem" / "core"),
            "sources",
        ]
        source.write_text("LIMIT = 2")
        compiled.folder.cache_clear()
        assert compiled.with_compiled("tandem.core", ["sources"]) == ["sources"]
    finally:
        compiled.folder.cache_clear()
        sys.path[:] = [entry for entry in sys.path if not entry.startswith(str(tmp_path))]
