"""PublishedBlocks against a brute-force model of the engine's cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem.core.blocks import root_hash, sequence_hashes, token_bytes
from tandem.core.prefix_index import Change, PublishedBlocks

SIZE = 2
ROOT = root_hash("m")
OTHER_ROOT = root_hash("m", cache_salt="tenant")


def tokens_of(path: tuple[int, ...]) -> list[int]:
    """A block is two tokens; its place in the tree of prompts names it."""
    return [part for step in path for part in (step, step + 1)]


def sequence_of(path: tuple[int, ...], root: int = ROOT) -> int:
    return sequence_hashes(token_bytes(tokens_of(path)), SIZE, root)[-1]


def store(blocks: PublishedBlocks, path: tuple[int, ...], new: int = 1, root: int = ROOT) -> Change:
    """The last ``new`` blocks of ``path``. The engine's hash of a block is its path, as bytes."""
    hashes = [bytes(path[:i]) for i in range(len(path) - new + 1, len(path) + 1)]
    parent = bytes(path[: len(path) - new]) or None
    return blocks.stored(hashes, parent, tokens_of(path[len(path) - new :]), root)


def test_hashes_are_those_of_the_prompt() -> None:
    blocks = PublishedBlocks(SIZE)
    path = (1, 2, 3)
    expected = list(sequence_hashes(token_bytes(tokens_of(path)), SIZE, ROOT))
    assert store(blocks, path, new=3) == (expected, [])
    assert blocks.snapshot() == expected


def test_roots_keep_equal_prompts_apart() -> None:
    blocks = PublishedBlocks(SIZE)
    blocks.stored([1], None, [1, 2], ROOT)
    add, _ = blocks.stored([2], None, [1, 2], OTHER_ROOT)
    assert add == [sequence_of((1,), OTHER_ROOT)]
    assert len(blocks) == 2


def test_stored_twice_removed_once_stays() -> None:
    blocks = PublishedBlocks(SIZE)
    store(blocks, (1, 2), new=2)
    assert store(blocks, (1, 2), new=2) == ([], [])
    assert blocks.removed([bytes((1,))]) == ([], [])
    assert blocks.removed([bytes((1,))]) == ([], [sequence_of((1, 2)), sequence_of((1,))])


def test_a_parent_takes_its_descendants_along_and_brings_them_back() -> None:
    blocks = PublishedBlocks(SIZE)
    store(blocks, (1, 2, 3), new=3)
    add, remove = blocks.removed([bytes((2 - 1,))])
    assert add == []
    assert remove == [sequence_of((1, 2, 3)), sequence_of((1, 2)), sequence_of((1,))]
    assert blocks.snapshot() == []
    assert store(blocks, (1,)) == ([sequence_of((1,)), sequence_of((1, 2)), sequence_of((1, 2, 3))], [])


def test_unknown_parent_stays_unpublished_until_it_comes() -> None:
    blocks = PublishedBlocks(SIZE)
    assert store(blocks, (1, 2, 3), new=2) == ([], [])
    assert store(blocks, (1,)) == ([sequence_of((1,)), sequence_of((1, 2)), sequence_of((1, 2, 3))], [])


def test_two_blocks_of_one_sequence_hash_count_as_two() -> None:
    """The engine told them apart by something that our hash does not cover."""
    blocks = PublishedBlocks(SIZE)
    blocks.stored([1], None, [1, 2], ROOT)
    assert blocks.stored([2], None, [1, 2], ROOT) == ([], [])
    assert blocks.removed([1]) == ([], [])
    assert blocks.removed([2]) == ([], [sequence_of((1,))])


def test_cleared_and_missed_forget_everything_children_first() -> None:
    for forget in (PublishedBlocks.cleared, PublishedBlocks.missed):
        blocks = PublishedBlocks(SIZE)
        store(blocks, (1, 2), new=2)
        assert forget(blocks) == ([], [sequence_of((1, 2)), sequence_of((1,))])
        assert store(blocks, (1, 2)) == ([], [])
        assert blocks.removed([bytes((9,))]) == ([], [])


@given(st.integers(1, 3000))
@settings(max_examples=3, deadline=None)
def test_long_chains_do_not_recurse(length: int) -> None:
    blocks = PublishedBlocks(1)
    hashes = list(range(length))
    blocks.stored(hashes, None, hashes, ROOT)
    _, remove = blocks.removed([0])
    assert len(remove) == length
    add, _ = blocks.stored([0], None, [0], ROOT)
    assert len(add) == length


paths = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


@dataclass
class Truth:
    """Which blocks the engine holds, how often; as far as the events tell."""

    counts: dict[tuple[int, ...], int] = field(default_factory=dict)

    def published(self) -> set[int]:
        return {
            sequence_of(path) for path in self.counts if all(path[:i] in self.counts for i in range(1, len(path) + 1))
        }


class AnyEvents(RuleBasedStateMachine):
    """Any events, in any order, those of a sane engine or not; the index's picture is kept by what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = PublishedBlocks(SIZE)
        self.truth = Truth()
        self.index: set[int] = set()
        self.parents: dict[int, int | None] = {}

    def apply(self, change: Change) -> None:
        """One bit at a time: the index is prefix-closed in between, too."""
        add, remove = change
        for sequence in remove:
            assert sequence in self.index
            assert not any(self.parents[child] == sequence for child in self.index)
            self.index.remove(sequence)
        for sequence in add:
            assert sequence not in self.index
            assert self.parents[sequence] is None or self.parents[sequence] in self.index
            self.index.add(sequence)

    @rule(path=paths, data=st.data())
    def stored(self, path: tuple[int, ...], data: st.DataObject) -> None:
        new = data.draw(st.integers(1, len(path)))
        for i in range(1, len(path) + 1):
            self.parents[sequence_of(path[:i])] = sequence_of(path[: i - 1]) if i > 1 else None
            if i > len(path) - new:
                self.truth.counts[path[:i]] = self.truth.counts.get(path[:i], 0) + 1
        self.apply(store(self.blocks, path, new))

    @rule(several=st.lists(paths, max_size=3))
    def removed(self, several: list[tuple[int, ...]]) -> None:
        for path in several:
            if path in self.truth.counts:
                self.truth.counts[path] -= 1
                if self.truth.counts[path] == 0:
                    del self.truth.counts[path]
        self.apply(self.blocks.removed([bytes(path) for path in several]))

    @rule(missed=st.booleans())
    def forgotten(self, missed: bool) -> None:
        self.truth.counts.clear()
        self.apply(self.blocks.missed() if missed else self.blocks.cleared())

    @invariant()
    def index_is_the_truth(self) -> None:
        assert self.index == self.truth.published()
        snapshot = self.blocks.snapshot()
        assert set(snapshot) == self.index
        place = {sequence: i for i, sequence in enumerate(snapshot)}
        for sequence in snapshot:
            parent = self.parents[sequence]
            assert parent is None or place[parent] < place[sequence]


TestAnyEvents = AnyEvents.TestCase
TestAnyEvents.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
