"""Decode steps as recordings: one per size of batch and bound on length, on shared static buffers.

A step in which every sequence computes one token runs the same kernels as any other of its shape.
It is padded to the next recorded batch; a padding row has no KV, writes none, and its token is not
read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from epd.block_rows import BlockRows
from epd.models.context import AttentionBatch, ForwardContext
from epd.recordings import Recordings
from epd.sampler import likeliest
from epd.staging import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from epd.graphs import Recorder
    from epd.kv.pool import KVPool
    from epd.models.decoder import Decoder
    from epd.scheduler import Chunk
    from epd.staging import HostArray

__all__ = ["DecodeGraphs", "DecodeShape", "batch_sizes", "length_bounds", "table_width"]

_INT64: np.dtype[Any] = np.dtype(np.int64)
_INT32: np.dtype[Any] = np.dtype(np.int32)
_LEAST_BOUND = 1024
_WIDTH = 16  # strides of block tables stay multiples of this, and kernels compiled for it fit


class DecodeShape(NamedTuple):
    """Rows of a step, and positions that no sequence of it exceeds."""

    batch: int
    bound: int


def batch_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ... up to `most`, which is the last."""
    sizes = [1, 2, 4, 8]
    power = 16
    while power < most:
        sizes += [power, power * 3 // 2]
        power *= 2
    return [*(size for size in sizes if size < most), most]


def length_bounds(longest: int) -> list[int]:
    """Powers of four from 1,024 on, and `longest` itself as the last."""
    bounds, bound = [], _LEAST_BOUND
    while bound < longest:
        bounds.append(bound)
        bound *= 4
    return [*bounds, longest]


def table_width(bound: int, block_size: int) -> int:
    """Blocks of a row of a block table for `bound` positions, a multiple of 16."""
    return -(-bound // (block_size * _WIDTH)) * _WIDTH


class DecodeGraphs:
    """Runs steps in which every sequence decodes. Call `record` or `defer` before."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        recorder: Recorder,
        *,
        layer_group: tuple[int, ...],
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._layer_group = layer_group
        self._batches = batch_sizes(max_num_seqs)
        self._bounds = length_bounds(max_model_len)
        # small batches first: they gain most, should memory not suffice for all
        shapes = [DecodeShape(size, bound) for size in self._batches for bound in self._bounds]
        self._recordings = Recordings(recorder, shapes, layout=self._layout, make=self._step)
        self._rows = BlockRows()
        rows, device = self._batches[-1], recorder.device
        vocabulary = decoder.config.vocab_size
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._logits = torch.zeros(rows, vocabulary, dtype=torch.float32, device=device)
        self._best = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def ready(self) -> bool:
        """Whether `record` or `defer` was called."""
        return self._recordings.ready

    @torch.inference_mode()
    def record(self, max_bytes: int) -> int:
        """How many shapes were recorded, as `max_bytes` allow. The others run call by call."""
        return self._recordings.record("decode", max_bytes, lambda arrays: self._fill(arrays, []))

    def defer(self, max_bytes: int) -> None:
        """Record each shape when it is first needed, which costs that step some 50 ms."""
        self._recordings.defer(max_bytes)

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether this step is one: everybody decodes, nothing is pruned, no row is an image's."""
        return self.ready and all(map(_decodes, chunks))

    def run(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits `[S, vocab]` and the best ids int64 `[S]`, -1 where those are not finite.

        Both are overwritten by the next step.
        """
        self._recordings.run(self.shape(chunks), lambda arrays: self._fill(arrays, chunks))
        return self._logits[: len(chunks)], self._best[: len(chunks)]

    def shape(self, chunks: Sequence[Chunk]) -> DecodeShape:
        """The least shape that holds the step."""
        longest = 1
        for chunk in chunks:
            assert chunk.sequence.table is not None
            longest = max(longest, max(chunk.sequence.table.lengths) + 1)
        return DecodeShape(
            next(size for size in self._batches if size >= len(chunks)),
            next(bound for bound in self._bounds if bound >= longest),
        )

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        """Ids, positions; per layer group slots, lengths and block tables."""
        rows, bound = shape
        row: tuple[tuple[int, ...], np.dtype[Any]] = ((rows,), _INT64)
        width = table_width(bound, self._pool.block_size)
        group = [row, ((rows,), _INT32), ((rows, width), _INT32)]
        return Layout([row, row, *group * (max(self._layer_group) + 1)])

    def _step(self, shape: tuple[int, ...], inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        """The step of `shape`, to be called."""
        rows, bound = shape
        ids, positions, *rest = inputs
        groups = tuple(
            AttentionBatch(
                cu_seqlens_q=self._starts[: rows + 1], slot_mapping=rest[at],
                seq_lens=rest[at + 1], block_tables=rest[at + 2], max_seqlen_q=1,
                max_seqlen_k=bound,
            )
            for at in range(0, len(rest), 3)
        )  # fmt: skip
        context = ForwardContext(groups=groups, layer_group=self._layer_group, kv=self._pool)

        def step() -> None:
            hidden = self._decoder.forward(self._decoder.embed(ids), positions, context)
            logits = self._decoder.logits(hidden)
            self._best[:rows].copy_(likeliest(logits))
            self._logits[:rows].copy_(logits)

        return step

    def _fill(self, arrays: Sequence[HostArray], chunks: Sequence[Chunk]) -> None:
        """Write a step into the host's buffer. Tables of padding rows are never followed."""
        sequences, count = [chunk.sequence for chunk in chunks], len(chunks)
        ids, positions, *rest = arrays
        size = self._pool.block_size
        ids[:count] = [s.tokens[s.num_computed] for s in sequences]
        positions[:count] = [s.next_pos for s in sequences]
        ids[count:] = positions[count:] = 0
        for group in range(len(rest) // 3):
            slots, lengths, tables = rest[3 * group : 3 * group + 3]
            for row, sequence in enumerate(sequences):
                assert sequence.table is not None
                past, blocks = sequence.table.lengths[group], self._rows.of(sequence, group)
                lengths[row] = past + 1
                slots[row] = int(blocks[past // size]) * size + past % size
                tables[row, : len(blocks)] = blocks[: tables.shape[1]]
            lengths[count:] = 0
            slots[count:] = -1
        self._rows.keep(sequences)


def _decodes(chunk: Chunk) -> bool:
    spans, computed = chunk.sequence.spans, chunk.sequence.num_computed
    plain = chunk.length == 1 and chunk.samples and not chunk.dropped
    return plain and (not spans or spans[-1].stop <= computed)
