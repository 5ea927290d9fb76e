"""The command table and how mistakes end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tandem import compiled
from tandem.cli import main

ENGINE_MODULES = ("vllm", "torch", "transformers")


@pytest.mark.parametrize("name", sorted(main.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main.dispatch([name, "--help"])
    assert leave.value.code == 0
    assert f"usage: tandem {name}" in capsys.readouterr().out


def test_no_command_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch([]) == main.EXIT_MISTAKE
    out = capsys.readouterr().out
    assert all(summary in out for _, summary in main.COMMANDS.values())


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main.dispatch(["upp"])
    assert leave.value.code == main.EXIT_MISTAKE
    assert "upp" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["up", "--prefill", "-1"], ["up", "--http-port", "70000"], ["up", "--engine", "x"]])
def test_bad_values_are_refused_by_name(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main.dispatch(argv)
    assert leave.value.code == main.EXIT_MISTAKE
    assert argv[1] in capsys.readouterr().err


def test_a_mistake_is_one_message_without_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch(["up", "-f", "/no/such/file.yaml", "--print-deployment"]) == main.EXIT_MISTAKE
    err = capsys.readouterr().err
    assert err.startswith("error: cannot read deployment file /no/such/file.yaml")
    assert "Traceback" not in err


def test_a_misspelt_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TANDEM_NATS_ULR", "nats://example")
    assert main.dispatch(["up", "--print-deployment"]) == main.EXIT_MISTAKE
    assert "did you mean TANDEM_NATS_URL?" in capsys.readouterr().err


def test_the_wrong_python_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(main, "PYTHON", (3, 99))
    with pytest.raises(SystemExit) as leave:
        main.main(["version"])
    assert leave.value.code == main.EXIT_MISTAKE
    assert "Tandem needs Python 3.99" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.dispatch(["version", "-v"]) == 0
    assert capsys.readouterr().out.startswith("tandem ")


def test_version_says_whether_the_core_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    monkeypatch.setattr(compiled, "STORE", store)
    monkeypatch.setattr(compiled, "folder", lambda: store / "of these sources")

    def core() -> str:
        assert main.dispatch(["version", "-v"]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert core().startswith("decision core: Python: nobody has compiled it")
    (store / "of others").mkdir(parents=True)
    assert core().startswith("decision core: Python: its sources have changed")
    compiled.folder().mkdir()
    assert core() == "decision core: compiled"
    monkeypatch.setitem(sys._xoptions, "tandem-interpreted", True)
    assert core().startswith("decision core: Python, as")


def test_starting_imports_no_engine() -> None:
    code = f"import sys, tandem.cli.up; sys.exit(any(name in sys.modules for name in {ENGINE_MODULES!r}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
