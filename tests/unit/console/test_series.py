"""Counts that came over some seconds are spread over those."""

from __future__ import annotations

import pytest

from services.console.frontend_counts import Counts
from services.console.series import Series


@pytest.mark.parametrize("over_s", [1.0, 5.02])
def test_rates_are_the_same_however_seldom_they_are_counted(over_s: float) -> None:
    series = Series(counted=True)
    for look in range(1, 60):
        series.count(Counts(offered=10 * round(over_s), good=8 * round(over_s)), 1000 + look * over_s, over_s)
    columns = series.points(1000 + 59 * over_s, span_s=30, step_s=5)["columns"]
    assert columns["requests_per_s"][1:-1] == pytest.approx([10.0] * 4, abs=2.1)
    assert columns["attainment"][1:-1] == pytest.approx([0.8] * 4)
