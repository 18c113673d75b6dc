"""What a step tells the device: ids, positions, and where the KV of each layer group is.

Lengths, block tables and slots are those of `AttentionBatch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from epd.models.context import AttentionBatch
from epd.staging import send_all

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from epd.kv.blocks import BlockTable
    from epd.scheduler import Chunk

    IntArray = np.ndarray[Any, np.dtype[np.int64 | np.int32]]

__all__ = ["GroupArrays", "ImageRows", "StepArrays", "StepTensors", "step_arrays"]

_ROUNDED = 16


class ImageRows(NamedTuple):
    """Vision tokens `start` to `stop - 1` of an image, which stand in a step."""

    request_id: str
    image: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step on the device. `last` int64 are the rows, at the end of the stack, that sample.

    `images` end to end are the vision tokens of the step; `sources` int32 `[T]` says which of them
    stands in a row, -1 for text.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor
    images: list[ImageRows]
    groups: tuple[AttentionBatch, ...]
    last: torch.Tensor


@dataclass(frozen=True, slots=True)
class GroupArrays:
    """What one layer group sees; the fields of `AttentionBatch` on the host."""

    starts: IntArray
    lengths: IntArray
    tables: IntArray
    slots: IntArray
    most_queries: int
    most_keys: int

    def arrays(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        return self.starts, self.lengths, self.tables, self.slots


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step on the host; fields as of `StepTensors`."""

    ids: IntArray
    positions: IntArray
    sources: IntArray
    images: list[ImageRows]
    groups: list[GroupArrays]
    last: IntArray

    def send(self, device: torch.device) -> StepTensors:
        """The step on `device`, in one transfer."""
        arrays = [array for group in self.groups for array in group.arrays()]
        sent = send_all([self.ids, self.positions, self.sources, self.last, *arrays], device)
        batches = tuple(
            AttentionBatch(
                cu_seqlens_q=sent[at], seq_lens=sent[at + 1], block_tables=sent[at + 2],
                slot_mapping=sent[at + 3], max_seqlen_q=group.most_queries,
                max_seqlen_k=group.most_keys,
            )
            for at, group in zip(range(4, len(sent), 4), self.groups, strict=True)
        )  # fmt: skip
        return StepTensors(
            ids=sent[0], positions=sent[1], sources=sent[2], last=sent[3], images=self.images,
            groups=batches,
        )  # fmt: skip


def step_arrays(
    chunks: Sequence[Chunk], *, num_groups: int, block_size: int, steady: bool
) -> StepArrays:
    """A step on the host. With `steady` its bounds are rounded up (see `_steady`)."""
    groups = [_group(chunks, group, block_size) for group in range(num_groups)]
    if steady:
        groups = [_steady(group, block_size) for group in groups]
    ends = np.cumsum([chunk.rows(num_groups - 1) for chunk in chunks]) - 1
    sampling = np.fromiter((chunk.samples for chunk in chunks), np.bool_, len(chunks))
    ids: list[int] = []
    positions: list[int] = []
    for chunk in chunks:
        start = chunk.sequence.num_computed
        ids += chunk.sequence.tokens[start : start + chunk.length]
        positions.extend(chunk.sequence.upcoming(chunk.length))
    images, sources = _images(chunks, len(ids))
    return StepArrays(
        ids=np.array(ids, np.int64), positions=np.array(positions, np.int64), sources=sources,
        images=images, groups=groups, last=ends[sampling],
    )  # fmt: skip


def _images(chunks: Sequence[Chunk], num_tokens: int) -> tuple[list[ImageRows], IntArray]:
    """The images of a step, and the vision token of each row."""
    sources = np.full(num_tokens, -1, np.int32)
    images: list[ImageRows] = []
    first = count = 0
    for chunk in chunks:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        for image, span in enumerate(sequence.spans):
            low, high = max(span.start, start), min(span.stop, start + chunk.length)
            if low < high:
                rows = slice(first + low - start, first + high - start)
                sources[rows] = np.arange(count, count + high - low)
                images.append(
                    ImageRows(sequence.request_id, image, low - span.start, high - span.start)
                )
                count += high - low
        first += chunk.length
    return images, sources


def _group(chunks: Sequence[Chunk], group: int, size: int) -> GroupArrays:
    """What one layer group sees of the step."""
    tables: list[BlockTable] = []
    for chunk in chunks:
        assert chunk.sequence.table is not None
        tables.append(chunk.sequence.table)
    lengths = np.array([chunk.rows(group) for chunk in chunks], np.int64)
    starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    past = np.array([table.lengths[group] for table in tables], np.int64)
    widths = [len(table.blocks[group]) for table in tables]
    blocks = np.zeros((len(tables), max(widths)), np.int32)
    for row, (table, width) in enumerate(zip(tables, widths, strict=True)):
        blocks[row, :width] = table.blocks[group]
    # each token's place in its sequence, then in its block
    row_of = np.repeat(np.arange(len(tables)), lengths)
    firsts = np.cumsum(lengths) - lengths
    place = np.arange(len(row_of)) - firsts[row_of] + past[row_of]
    slots = blocks[row_of, place // size].astype(np.int64) * size + place % size
    total = past + lengths
    return GroupArrays(
        starts=starts, lengths=total.astype(np.int32), tables=blocks, slots=slots,
        most_queries=int(lengths.max()), most_keys=int(total.max()),
    )  # fmt: skip


def _steady(group: GroupArrays, block_size: int) -> GroupArrays:
    """The same with tables of a multiple of 16 blocks, and bounds as coarse.

    Kernels are compiled for what divides their strides; rounded, all steps need the same ones. A
    bound of two queries keeps steps of single tokens on the kernels of prefill.
    """
    width = -(-group.tables.shape[1] // _ROUNDED) * _ROUNDED
    tables = np.zeros((len(group.tables), width), np.int32)
    # a warm-up's blocks lie nowhere, at -1: nothing is written there, and anything may be read
    np.maximum(group.tables, 0, out=tables[:, : group.tables.shape[1]])
    unit = _ROUNDED * block_size
    return GroupArrays(
        starts=group.starts, lengths=group.lengths, tables=tables, slots=group.slots,
        most_queries=max(group.most_queries, 2), most_keys=-(-group.most_keys // unit) * unit,
    )  # fmt: skip
