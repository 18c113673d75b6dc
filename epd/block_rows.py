"""Block tables as arrays, kept from step to step: a decoding sequence adds a block now and then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection
    from typing import Any

    from epd.kv.blocks import BlockTable
    from epd.sequence import Sequence

    IntArray = np.ndarray[Any, np.dtype[np.int32]]

__all__ = ["BlockRows"]

_SPARE = 64


@dataclass(slots=True)
class _Row:
    """The first `count` of `blocks` are those of a layer group of the table."""

    blocks: IntArray
    count: int

    def follow(self, blocks: list[int]) -> IntArray:
        if len(blocks) > len(self.blocks):
            grown = np.empty(len(blocks) + _SPARE, np.int32)
            grown[: self.count] = self.blocks[: self.count]
            self.blocks = grown
        self.blocks[self.count : len(blocks)] = blocks[self.count :]
        self.count = len(blocks)
        return self.blocks[: self.count]


class BlockRows:
    """Remembers the tables of the sequences it was last asked for.

    A table only ever grows; one that was given back is replaced by another object.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[BlockTable, list[_Row]]] = {}

    def of(self, sequence: Sequence, group: int) -> IntArray:
        """The blocks of a layer group, int32 `[n]`; to be read before the next call."""
        table = sequence.table
        assert table is not None
        known = self._known.get(sequence.request_id)
        if known is None or known[0] is not table:
            rows = [_Row(np.empty(0, np.int32), 0) for _ in table.blocks]
            known = self._known[sequence.request_id] = (table, rows)
        return known[1][group].follow(table.blocks[group])

    def keep(self, sequences: Collection[Sequence]) -> None:
        """Forget every other sequence, once there are many."""
        if len(self._known) > 2 * len(sequences) + _SPARE:
            names = {sequence.request_id for sequence in sequences}
            self._known = {name: kept for name, kept in self._known.items() if name in names}
