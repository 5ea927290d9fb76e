"""The page's table of candidates has a column for every term that a score weighs."""

from __future__ import annotations

import re
from pathlib import Path

import services.console
from tandem.core.placement import TERMS


def test_the_waterfall_knows_every_term() -> None:
    page = (Path(services.console.__file__).parent / "static" / "waterfall.js").read_text()
    declared = re.search(r"const TERMS = \{(.*)\};", page)
    assert declared is not None
    assert set(re.findall(r"(\w+): \[", declared[1])) == set(TERMS)
