"""Tokens depend on the tokens before them, and on nothing else that a request's path could change."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.types import SamplingParams
from tandem.enginemodel.content import TokenContent, Vocabulary

WORDS = Vocabulary(range(50, 90))


def drawn(prompt: list[int], count: int, vocabulary: Vocabulary = WORDS, **sampling: object) -> list[int]:
    params = SamplingParams(max_tokens=count, **sampling)  # type: ignore[arg-type]
    content = TokenContent(prompt, params, vocabulary, 4)
    return [token for _ in range(count) for token in content.draw(0).tokens]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=600), st.integers(0, 30))
def test_prompt_and_output_so_far_continue_alike(prompt: list[int], cut: int) -> None:
    whole = drawn(prompt, 30)
    assert drawn([*prompt, *whole[:cut]], 30 - cut) == whole[cut:]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50), st.data())
def test_every_token_matters(prompt: list[int], data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(prompt) - 1))
    other = list(prompt)
    other[i] += 1
    assert drawn(prompt, 30) != drawn(other, 30)


def test_hashes_are_those_of_the_same_tokens_as_a_prompt() -> None:
    content = TokenContent(range(10), SamplingParams(max_tokens=20), WORDS, 4, "lora", "salt")
    for _ in range(20):
        content.draw(0)
    again = TokenContent(content.tokens, SamplingParams(max_tokens=1), WORDS, 4, "lora", "salt")
    assert list(content.hashes) == list(again.hashes) and len(again.hashes) == 7
    other = TokenContent(content.tokens, SamplingParams(max_tokens=1), WORDS, 4, "lora", "else")
    assert not set(other.hashes) & set(again.hashes)


def test_taint_changes_the_tokens() -> None:
    right, wrong = (TokenContent(range(10), SamplingParams(max_tokens=20), WORDS, 4) for _ in range(2))
    assert right.draw(0, 20).tokens != wrong.draw(77, 20).tokens


def test_bias_forces_and_bans() -> None:
    assert drawn([1], 5, logit_bias=((60, 100.0),)) == [60] * 5
    banned = tuple((token, -100.0) for token in range(50, 89))
    assert drawn([1], 5, logit_bias=banned) == [89] * 5


def test_mean_output_length_is_about_what_was_asked() -> None:
    vocabulary = Vocabulary(range(50, 90), eos_id=2, mean_osl=20)
    lengths = [drawn([i], 400, vocabulary).index(2) + 1 for i in range(300)]
    assert 15 < sum(lengths) / len(lengths) < 25
    assert 2 not in drawn([7], 400, vocabulary, ignore_eos=True)
    assert 2 not in drawn([7], 100, vocabulary, min_tokens=100)
