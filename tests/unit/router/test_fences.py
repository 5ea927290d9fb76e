from __future__ import annotations

from services.router.fences import REMEMBERED_S, Fences
from tandem.core.types import RequestKey


def test_attempts_up_to_the_cancelled_one_are_held() -> None:
    fences = Fences()
    fences.add("a", 1, None, 0.0)
    fences.add("a", 0, None, 0.0)
    assert fences.holds(RequestKey("a", 0, 3)) and fences.holds(RequestKey("a", 1))
    assert not fences.holds(RequestKey("a", 2)) and not fences.holds(RequestKey("b", 0))


def test_one_choice_or_all() -> None:
    fences = Fences()
    fences.add("a", 0, 1, 0.0)
    assert fences.holds(RequestKey("a", 0, 1)) and not fences.holds(RequestKey("a", 0, 0))


def test_what_is_old_is_forgotten() -> None:
    fences = Fences()
    for number in range(100):
        fences.add(str(number), 0, None, 0.0)
    fences.add("0", 0, None, 1.0)
    fences.add("new", 0, None, REMEMBERED_S)
    assert len(fences) == 2 and fences.holds(RequestKey("0", 0)), "heard again, it stays longer"
