"""When workers are asked about a request, and what their answers mean."""

from __future__ import annotations

from services.router.doubts import Doubts
from tandem.core.types import RequestKey

KEY, OTHER = RequestKey("a"), RequestKey("b")


def test_both_workers_are_asked_after_a_silence_and_again_after_the_next() -> None:
    doubts = Doubts(5.0)
    doubts.placed(KEY, ["p", "d"], 0.0)
    assert doubts.questions(4.9) == {}
    assert doubts.questions(5.0) == {"p": [KEY], "d": [KEY]}
    assert doubts.questions(9.9) == {}
    assert doubts.questions(10.0) == {"p": [KEY], "d": [KEY]}


def test_news_put_the_question_off() -> None:
    doubts = Doubts(5.0)
    doubts.placed(KEY, ["d"], 0.0)
    doubts.heard(KEY, 4.0)
    assert doubts.questions(8.0) == {}
    assert doubts.questions(9.0) == {"d": [KEY]}


def test_it_is_lost_when_all_of_its_workers_say_that_they_do_not_know_it() -> None:
    doubts = Doubts(5.0)
    doubts.placed(KEY, ["p", "d"], 0.0)
    doubts.questions(5.0)
    assert not doubts.denied(KEY, "d")
    assert not doubts.denied(KEY, "d"), "told twice"
    assert doubts.denied(KEY, "p")


def test_one_that_knows_it_outweighs_an_older_denial() -> None:
    doubts = Doubts(5.0)
    doubts.placed(KEY, ["p", "d"], 0.0)
    doubts.questions(5.0)
    assert not doubts.denied(KEY, "p")
    doubts.heard(KEY, 5.1)
    assert not doubts.denied(KEY, "d")


def test_denials_of_different_questions_do_not_add_up() -> None:
    doubts = Doubts(5.0)
    doubts.placed(KEY, ["p", "d"], 0.0)
    doubts.questions(5.0)
    doubts.denied(KEY, "p")
    doubts.questions(10.0)
    assert not doubts.denied(KEY, "d")


def test_what_is_over_is_forgotten() -> None:
    doubts = Doubts(5.0)
    doubts.placed(KEY, ["d"], 0.0)
    doubts.placed(OTHER, ["d"], 0.0)
    doubts.keep(lambda key: key == OTHER)
    assert len(doubts) == 1
    assert doubts.questions(9.0) == {"d": [OTHER]}
    assert not doubts.denied(KEY, "d")
