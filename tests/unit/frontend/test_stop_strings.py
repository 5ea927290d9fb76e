"""Whatever the borders of the pieces: cut exactly before the stop string that is complete first."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.frontend.stop_strings import StopStrings

letters = st.text("abc", max_size=30)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str]) -> str:
    """The definition, letter by letter."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def pieces(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[a:b] for a, b in pairwise(borders)]


@given(letters, stop_lists, st.lists(st.integers(0, 30), max_size=10))
def test_cut_whatever_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    stopper = StopStrings(stops)
    out = "".join(stopper.push(piece) for piece in pieces(text, cuts))
    whole = expected(text, stops)
    assert whole.startswith(out)  # nothing given out that belongs to a stop string
    if stopper.found is None:
        out += stopper.finish()
    assert out == whole
    assert (stopper.found is not None) == any(stop in text for stop in stops)


@given(letters, stop_lists)
def test_nothing_is_held_that_cannot_become_a_stop_string(text: str, stops: list[str]) -> None:
    stopper = StopStrings(stops)
    out = stopper.push(text)
    if stopper.found is None:
        held = text[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_found_names_the_stop_string() -> None:
    stopper = StopStrings(["END", "\n\n"])
    assert [stopper.push(p) for p in ("one E", "N", "D two\n\n")] == ["one ", "", ""]
    assert stopper.found == "END"


def test_a_beginning_that_comes_to_nothing_is_given_out() -> None:
    stopper = StopStrings(["<|stop|>"])
    assert stopper.push("a <|st") + stopper.push("ring|>") == "a <|string|>"
