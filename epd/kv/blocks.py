"""Who owns which KV block: free list, reference counts, prefix reuse. Plain Python, no tensors.

Layers that hold the same tokens form a layer group. Block ids are counted per group: block 3 of
group 0 and block 3 of group 1 are different memory, because they lie in different layers.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["BlockManager", "BlockTable", "ImageSpan", "extend_hashes"]


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Positions [start, stop) of a token list that one image fills; `key` names its content."""

    start: int
    stop: int
    key: str


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence: per layer group its block ids and the KV length they hold."""

    blocks: list[list[int]]
    lengths: list[int]
    num_published: int = 0


def extend_hashes(
    hashes: list[bytes],
    tokens: Sequence[int],
    *,
    spans: Sequence[ImageSpan],
    block_size: int,
    salt: str,
) -> None:
    """Append to `hashes` the chain hash of every full block of `tokens` that it lacks.

    A hash covers the salt, every token before the block and the block itself; positions of an image
    count as (content key, offset in the image), so equal placeholders of different images differ.
    """
    for index in range(len(hashes), len(tokens) // block_size):
        start, stop = index * block_size, (index + 1) * block_size
        parent = hashes[-1] if hashes else blake2b(salt.encode(), digest_size=32).digest()
        digest = blake2b(parent, digest_size=32)
        digest.update(array("q", tokens[start:stop]).tobytes())
        for span in spans:
            if span.start < stop and span.stop > start:
                digest.update(f"{len(span.key)}:{span.key}{span.start - start};".encode())
        hashes.append(digest.digest())


class _Group:
    """The blocks of one layer group."""

    def __init__(self, num_blocks: int) -> None:
        self.refs = [0] * num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.hash_of: list[bytes | None] = [None] * num_blocks
        self.by_hash: dict[bytes, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # hashed, unreferenced, oldest first

    @property
    def num_free(self) -> int:
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A block with one reference, the least recently used prefix block if none is free."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            self.unpublish(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        if self.refs[block] == 0:
            del self.idle[block]
        self.refs[block] += 1

    def drop(self, block: int) -> None:
        assert self.refs[block] > 0, "block freed twice"
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if self.hash_of[block] is None:
                self.free.append(block)
            else:
                self.idle[block] = None

    def publish(self, block: int, digest: bytes) -> None:
        # the first block of a content keeps the name; later twins stay private
        if digest not in self.by_hash:
            self.by_hash[digest] = block
            self.hash_of[block] = digest

    def unpublish(self, block: int) -> None:
        digest = self.hash_of[block]
        if digest is not None:
            del self.by_hash[digest]
            self.hash_of[block] = None


class BlockManager:
    """Hands out the blocks of a paged KV cache, `num_blocks` per layer group.

    Blocks of a finished sequence that carry a prefix hash stay readable until their memory is
    needed, oldest first. A shared block is full and is never written again.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, num_groups: int = 1, prefix_cache: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._groups = [_Group(num_blocks) for _ in range(num_groups)]

    @property
    def num_groups(self) -> int:
        """Number of layer groups."""
        return len(self._groups)

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now in every group, idle prefix blocks included."""
        return min(group.num_free for group in self._groups)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Number of leading blocks of `hashes` whose KV is present in every layer group."""
        if not self.prefix_cache:
            return 0
        count = 0
        for digest in hashes:
            if any(digest not in group.by_hash for group in self._groups):
                break
            count += 1
        return count

    def open(self, hashes: Sequence[bytes] = ()) -> BlockTable:
        """A table that shares the present blocks of the prefix `hashes`, or an empty one."""
        count = self.match(hashes)
        blocks = [[group.by_hash[digest] for digest in hashes[:count]] for group in self._groups]
        for group, shared in zip(self._groups, blocks, strict=True):
            for block in shared:
                group.share(block)
        return BlockTable(blocks, [count * self.block_size] * len(blocks), count)

    def missing(self, table: BlockTable, num_new: int | Sequence[int]) -> int:
        """Blocks that the neediest group of `table` lacks to hold `num_new` more tokens."""
        return max(0, *self._needs(table, num_new))

    def grow(self, table: BlockTable, num_new: int | Sequence[int]) -> bool:
        """Make room for `num_new` more tokens in every group; all of it, or False and nothing.

        A sequence gives each group its own number.
        """
        needs, groups = self._needs(table, num_new), self._groups
        if any(need > group.num_free for need, group in zip(needs, groups, strict=True)):
            return False
        for group, blocks, need in zip(groups, table.blocks, needs, strict=True):
            blocks.extend(group.take() for _ in range(need))
        return True

    def _needs(self, table: BlockTable, num_new: int | Sequence[int]) -> list[int]:
        """Blocks that each group of `table` lacks; negative where it has spare ones."""
        counts = [num_new] * len(table.blocks) if isinstance(num_new, int) else num_new
        return [
            self.blocks_for(length + count) - len(blocks)
            for blocks, length, count in zip(table.blocks, table.lengths, counts, strict=True)
        ]

    def publish(self, table: BlockTable, hashes: Sequence[bytes]) -> None:
        """Let later sequences share the blocks of `table` that are full; `hashes` names them.

        Call it after the forward pass that filled them, with every group holding every token.
        """
        if not self.prefix_cache:
            return
        full = min(min(table.lengths) // self.block_size, len(hashes))
        for index in range(table.num_published, full):
            for group, blocks in zip(self._groups, table.blocks, strict=True):
                group.publish(blocks[index], hashes[index])
        table.num_published = max(table.num_published, full)

    def close(self, table: BlockTable, *, forget: bool = False) -> None:
        """Give back every block of `table`; with `forget` none of its content is shared again."""
        for group, blocks in zip(self._groups, table.blocks, strict=True):
            for block in reversed(blocks):  # the deepest block of a prefix is reused first
                if forget:
                    group.unpublish(block)
                group.drop(block)
            blocks.clear()
        table.lengths = [0] * len(table.lengths)
        table.num_published = 0

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Raise `AssertionError` unless references, free list and hashes agree with `tables`."""
        live = list(tables)
        for index, group in enumerate(self._groups):
            refs = [0] * self.num_blocks
            for table in live:
                for block in table.blocks[index]:
                    refs[block] += 1
            assert refs == group.refs, "reference counts differ from the live tables"
            unused = {block for block, count in enumerate(refs) if count == 0}
            assert sorted([*group.free, *group.idle]) == sorted(unused), "a block leaked"
            named = {block: digest for block, digest in enumerate(group.hash_of) if digest}
            assert named == {block: digest for digest, block in group.by_hash.items()}
            assert all(group.hash_of[block] for block in group.idle)
            assert not any(group.hash_of[block] for block in group.free)
