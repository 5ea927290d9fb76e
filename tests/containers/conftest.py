"""One Docker engine for all of these tests, or a loud reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.containers.__main__ import REASON
from tests.containers.engine import answers


def _why_not() -> str:
    if reason := os.environ.get(REASON):
        return reason
    return "" if answers() else "no Docker engine answers; `python -m tests.containers` can start one"


_WHY_NOT = _why_not()


@pytest.fixture(scope="session", autouse=True)
def engine() -> None:
    if _WHY_NOT:
        pytest.skip(f"NO CONTAINER ENGINE: {_WHY_NOT}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _WHY_NOT:
        terminalreporter.section("NOT TESTED: containers", sep="!", red=True, bold=True)
        terminalreporter.line(_WHY_NOT)


@pytest.fixture(scope="session", autouse=True)
def _ryuk() -> Iterator[None]:
    """testcontainers without its cleaning container, which could not be pulled everywhere: the tests clean up."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
    patch.setenv("TESTCONTAINERS_CONNECTION_MODE", "docker_host")
    yield
    patch.undo()
