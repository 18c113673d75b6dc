"""Decode steps as recordings: one per size of batch and bound on length, on shared static buffers.

A step in which every sequence computes one token runs the same kernels as any other of its shape.
It is padded to the next recorded batch; a padding row has no KV, writes none, and its token is not
read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import structlog
import torch

from epd.block_rows import BlockRows
from epd.models.context import AttentionBatch, ForwardContext
from epd.staging import Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epd.graphs import Recorder
    from epd.kv.pool import KVPool
    from epd.models.decoder import Decoder
    from epd.scheduler import Chunk
    from epd.staging import HostArray

__all__ = ["DecodeGraphs", "DecodeShape", "batch_sizes", "length_bounds"]

_log = structlog.get_logger("epd.core")
_INT64: np.dtype[Any] = np.dtype(np.int64)
_INT32: np.dtype[Any] = np.dtype(np.int32)
_LEAST_BOUND = 1024
_WIDTH = 16  # strides of block tables stay multiples of this, and kernels compiled for it fit


class DecodeShape(NamedTuple):
    """Rows of a step, and positions that no sequence of it exceeds."""

    batch: int
    bound: int


class _Group(NamedTuple):
    slots: HostArray
    lengths: HostArray
    tables: HostArray


class _Inputs(NamedTuple):
    """What the host writes for one shape: views into its buffer."""

    ids: HostArray
    positions: HostArray
    groups: list[_Group]


@dataclass(frozen=True, slots=True)
class _Recording:
    """One shape: the views that the host fills, how much it sends, and what repeats the step."""

    inputs: _Inputs
    nbytes: int
    repeat: Callable[[], None]


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


class DecodeGraphs:
    """Runs steps in which every sequence decodes. Call `record` before, once the KV pool exists."""

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
        self._recorder = recorder
        self._layer_group = layer_group
        self._batches = batch_sizes(max_num_seqs)
        self._bounds = length_bounds(max_model_len)
        self._recordings: dict[DecodeShape, _Recording] = {}
        self._rows = BlockRows()
        largest = self._layout(DecodeShape(self._batches[-1], self._bounds[-1])).nbytes
        self._host, self._device = recorder.buffers(largest)
        rows, device = self._batches[-1], recorder.device
        vocabulary = decoder.config.vocab_size
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._logits = torch.zeros(rows, vocabulary, dtype=torch.float32, device=device)
        self._best = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def shapes(self) -> list[DecodeShape]:
        """All shapes, small batches first: they gain most, should memory not suffice for all."""
        return [DecodeShape(b, n) for b in self._batches for n in self._bounds]

    @property
    def ready(self) -> bool:
        """Whether `record` was called."""
        return bool(self._recordings)

    @torch.inference_mode()
    def record(self, max_bytes: int) -> int:
        """How many shapes were recorded, as `max_bytes` allow. The others run call by call."""
        begin, count = time.monotonic(), 0
        for shape in self.shapes:
            recording = self._recording(shape)
            self._fill(recording.inputs, [])
            self._send(recording.nbytes)
            if self._recorder.held_bytes() <= max_bytes:
                repeat = self._recorder.record(recording.repeat)
                recording = _Recording(recording.inputs, recording.nbytes, repeat)
                count += 1
            else:
                recording.repeat()
            self._recordings[shape] = recording
        _log.info(
            "decode steps recorded", count=count, left_out=len(self.shapes) - count,
            seconds=round(time.monotonic() - begin, 1),
            megabytes=self._recorder.held_bytes() >> 20,
        )  # fmt: skip
        return count

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether this step is one: everybody decodes, nothing is pruned, no row is an image's."""
        return self.ready and all(map(_decodes, chunks))

    def run(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits `[S, vocab]` and the best ids int64 `[S]`, -1 where those are not finite.

        Both are overwritten by the next step.
        """
        recording = self._recordings[self.shape(chunks)]
        self._recorder.ready()
        self._fill(recording.inputs, chunks)
        self._send(recording.nbytes)
        recording.repeat()
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

    def _send(self, nbytes: int) -> None:
        self._recorder.send(self._host[:nbytes], self._device[:nbytes])

    def _layout(self, shape: DecodeShape) -> Layout:
        rows = shape.batch
        blocks = -(-shape.bound // self._pool.block_size)
        width = -(-blocks // _WIDTH) * _WIDTH
        row: tuple[tuple[int, ...], np.dtype[Any]] = ((rows,), _INT64)
        group = [row, ((rows,), _INT32), ((rows, width), _INT32)]
        return Layout([row, row, *group * (max(self._layer_group) + 1)])

    def _recording(self, shape: DecodeShape) -> _Recording:
        """The step of `shape`, to be called."""
        layout = self._layout(shape)
        ids, positions, *rest = layout.tensors(self._device)
        groups = tuple(
            AttentionBatch(
                cu_seqlens_q=self._starts[: shape.batch + 1], slot_mapping=rest[at],
                seq_lens=rest[at + 1], block_tables=rest[at + 2], max_seqlen_q=1,
                max_seqlen_k=shape.bound,
            )
            for at in range(0, len(rest), 3)
        )  # fmt: skip
        context = ForwardContext(groups=groups, layer_group=self._layer_group, kv=self._pool)

        def step() -> None:
            hidden = self._decoder.forward(self._decoder.embed(ids), positions, context)
            logits = self._decoder.logits(hidden)
            best, index = logits.max(dim=-1)
            self._best[: shape.batch].copy_(torch.where(best.isfinite(), index, -1))
            self._logits[: shape.batch].copy_(logits)

        one, two, *others = layout.arrays(self._host)
        inputs = _Inputs(one, two, [_Group(*others[i : i + 3]) for i in range(0, len(others), 3)])
        return _Recording(inputs, layout.nbytes, step)

    def _fill(self, inputs: _Inputs, chunks: Sequence[Chunk]) -> None:
        """Write a step into the host's buffer. Tables of padding rows are never followed."""
        sequences, count = [chunk.sequence for chunk in chunks], len(chunks)
        size = self._pool.block_size
        inputs.ids[:count] = [s.tokens[s.num_computed] for s in sequences]
        inputs.positions[:count] = [s.next_pos for s in sequences]
        inputs.ids[count:] = inputs.positions[count:] = 0
        for group, (slots, lengths, tables) in enumerate(inputs.groups):
            for row, sequence in enumerate(sequences):
                assert sequence.table is not None
                past, blocks = sequence.table.lengths[group], self._rows.of(sequence, group)
                lengths[row] = past + 1
                slots[row] = int(blocks[past // size]) * size + past % size
                tables[row, : len(blocks)] = blocks
            lengths[count:] = 0
            slots[count:] = -1
        self._rows.keep(sequences)


def _decodes(chunk: Chunk) -> bool:
    spans, computed = chunk.sequence.spans, chunk.sequence.num_computed
    plain = chunk.length == 1 and chunk.samples and not chunk.dropped
    return plain and (not spans or spans[-1].stop <= computed)
