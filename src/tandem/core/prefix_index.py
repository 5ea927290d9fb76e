"""What a worker tells the prefix index, made from the events of its engine's prefix cache.

The index finds a worker's depth by bisection, so what is published must be prefix-closed at every moment: a block only
while its parent is, and a parent no sooner gone than its children. One hole would make most lookups report too much.

In: stored, removed and cleared blocks under the engine's own hashes, which are opaque here. Out of every call: the
sequence hashes (core/blocks.py) to add, parents first, and to remove, children first. An engine may store a block
more than once, and then it is gone after as many removals. After missed events everything is forgotten: a block that
is not published costs a hit until it is reported again; one that is published and not there misleads every placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tandem.core.blocks import block_hash, chain, token_bytes

EngineHash = int | bytes
#: Sequence hashes to (add, remove).
Change = tuple[list[int], list[int]]


class _Block:
    """A block that the engine holds ``count`` times."""

    __slots__ = ("count", "local", "parent", "published", "sequence")

    def __init__(self, parent: EngineHash | None, local: int) -> None:
        self.parent = parent
        self.local = local
        self.sequence: int | None = None  # unknown while no chain down from the root was seen
        self.count = 1
        self.published = False


class PublishedBlocks:
    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[EngineHash, _Block] = {}
        self._children: dict[EngineHash, set[EngineHash]] = {}  # kept while a child is there, the parent or not
        # Sequence hash -> published blocks that have it: engines may tell blocks apart by more than we see.
        # Insertion order is parents first, because a block goes in after its parent and its parent out after it.
        self._published: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._published)

    def snapshot(self) -> list[int]:
        """Everything that is published, parents first."""
        return list(self._published)

    def stored(
        self, hashes: Sequence[EngineHash], parent: EngineHash | None, token_ids: Sequence[int], root: int
    ) -> Change:
        """A chain of blocks below ``parent``; None = from the prompt's start, where ``root`` is the chain's root."""
        size = self._block_size
        if len(token_ids) != size * len(hashes):
            raise ValueError(f"{len(token_ids)} tokens for {len(hashes)} blocks of {size}")
        added: list[int] = []
        for i, engine_hash in enumerate(hashes):
            known = self._blocks.get(engine_hash)
            if known is not None:
                known.count += 1
            else:
                block = _Block(parent, block_hash(token_bytes(token_ids[i * size : (i + 1) * size])))
                self._blocks[engine_hash] = block
                if parent is None:
                    block.sequence = chain(root, block.local)
                else:
                    self._children.setdefault(parent, set()).add(engine_hash)
                self._publish_down_from(engine_hash, added)
            parent = engine_hash
        return added, []

    def removed(self, hashes: Iterable[EngineHash]) -> Change:
        removed: list[int] = []
        for engine_hash in hashes:
            block = self._blocks.get(engine_hash)
            if block is None:
                continue
            block.count -= 1
            if block.count == 0:
                self._unpublish_up_to(engine_hash, removed)
                self._forget(engine_hash, block)
        return [], removed

    def cleared(self) -> Change:
        removed = self.snapshot()[::-1]
        self._blocks.clear()
        self._children.clear()
        self._published.clear()
        return [], removed

    def missed(self) -> Change:
        return self.cleared()

    def _publish_down_from(self, engine_hash: EngineHash, added: list[int]) -> None:
        """The block if its parent is published, and then what waited below it."""
        todo = [engine_hash]
        while todo:
            engine_hash = todo.pop()
            block = self._blocks[engine_hash]
            if block.parent is not None:
                parent = self._blocks.get(block.parent)
                if parent is None or parent.sequence is None or not parent.published:
                    continue
                if block.sequence is None:
                    block.sequence = chain(parent.sequence, block.local)
            assert block.sequence is not None
            block.published = True
            copies = self._published.get(block.sequence, 0)
            self._published[block.sequence] = copies + 1
            if copies == 0:
                added.append(block.sequence)
            todo.extend(self._children.get(engine_hash, ()))

    def _unpublish_up_to(self, engine_hash: EngineHash, removed: list[int]) -> None:
        """The block's published descendants, then the block."""
        family = [engine_hash]
        for member in family:  # grows while it is walked: parents before children
            family.extend(child for child in self._children.get(member, ()) if self._blocks[child].published)
        for member in reversed(family):
            block = self._blocks[member]
            if not block.published or block.sequence is None:
                continue
            block.published = False
            self._published[block.sequence] -= 1
            if self._published[block.sequence] == 0:
                del self._published[block.sequence]
                removed.append(block.sequence)

    def _forget(self, engine_hash: EngineHash, block: _Block) -> None:
        del self._blocks[engine_hash]
        if block.parent is not None:
            siblings = self._children[block.parent]
            siblings.discard(engine_hash)
            if not siblings:
                del self._children[block.parent]
