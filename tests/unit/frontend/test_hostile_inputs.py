"""The fuzzer of tests/fuzz at small size: it breaks nothing, and it reaches all kinds of ends."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.hostile import run


async def test_nothing_breaks(byte_level_folder: Path) -> None:
    ends, _ = await run(byte_level_folder, count=2_000, seed=7)
    assert ends.total() == 2_000
    wanted = {"taken", "refused: invalid_request", "refused: context_length_exceeded", "refused: model_not_found"}
    assert {*wanted, "parsed with calls", "parsed as text"} <= ends.keys()
