"""What a step tells the device, against the definition token by token."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from epd.kv.blocks import BlockTable, ImageSpan
from epd.request import SamplingParams
from epd.scheduler import Chunk
from epd.sequence import Sequence
from epd.staging import Layout, send_all
from epd.step_arrays import step_arrays

CPU, SIZE, GROUPS = torch.device("cpu"), 4, 2


def _chunk(source: random.Random, name: str) -> Chunk:
    """A chunk somewhere in a sequence with an image, its second layer group eight tokens short."""
    total, past = source.randint(40, 60), source.choice((0, 9, 15, 29))
    length = source.choice((1, 5, total - past))
    lengths = [past, max(past - 8, 0)]
    blocks = [
        [source.randrange(1000) for _ in range((n + length) // SIZE + 1)] for n in lengths
    ]  # fmt: skip
    sequence = Sequence(
        request_id=name, attempt=0, tokens=[source.randrange(5000) for _ in range(total)],
        num_prompt=total, spans=(ImageSpan(3, 13, "a"), ImageSpan(14, 20, "b")),
        sampling=SamplingParams(), table=BlockTable(blocks, lengths), num_computed=past,
        next_pos=past + 7, shift=7,
    )  # fmt: skip
    return Chunk(sequence, length, past + length == total)


@pytest.mark.parametrize("steady", [False, True])
def test_every_token_has_its_id_its_place_and_its_slot(steady: bool) -> None:
    source = random.Random(3)
    for _ in range(50):
        chunks = [_chunk(source, f"r{i}") for i in range(source.randint(1, 5))]
        step = step_arrays(chunks, num_groups=GROUPS, block_size=SIZE, steady=steady).send(CPU)
        rows = [(c, c.sequence.num_computed + i) for c in chunks for i in range(c.length)]
        assert step.positions.tolist() == [place + 7 for _, place in rows]
        assert step.ids.tolist() == [c.sequence.tokens[place] for c, place in rows]
        ends = np.cumsum([c.length for c in chunks]) - 1
        expected = [int(end) for end, c in zip(ends, chunks, strict=True) if c.samples]
        assert step.last.tolist() == expected
        vision = [
            (name, image, i) for name, image, start, stop in step.images for i in range(start, stop)
        ]
        for (chunk, place), at in zip(rows, step.sources.tolist(), strict=True):
            inside = [
                (chunk.sequence.request_id, i, place - span.start)
                for i, span in enumerate(chunk.sequence.spans)
                if span.start <= place < span.stop
            ]
            assert inside == ([vision[at]] if at >= 0 else [])
        for group, batch in enumerate(step.groups):
            _check_group(chunks, group, batch, steady)


def _check_group(chunks: list[Chunk], group: int, batch: Any, steady: bool) -> None:
    slots, lengths = [], []
    for row, chunk in enumerate(chunks):
        table = chunk.sequence.table
        assert table is not None
        blocks, past = table.blocks[group], table.lengths[group]
        lengths.append(past + chunk.length)
        slots += [blocks[p // SIZE] * SIZE + p % SIZE for p in range(past, past + chunk.length)]
        assert batch.block_tables[row, : len(blocks)].tolist() == blocks
    assert batch.slot_mapping.tolist() == slots
    assert batch.seq_lens.tolist() == lengths
    assert batch.cu_seqlens_q.diff().tolist() == [chunk.length for chunk in chunks]
    most = max(chunk.length for chunk in chunks)
    if steady:
        assert batch.block_tables.shape[1] % 16 == 0
        assert batch.max_seqlen_k % 64 == 0
        assert 0 <= batch.max_seqlen_k - max(lengths) < 64
        assert batch.max_seqlen_q == max(most, 2)
    else:
        assert (batch.max_seqlen_q, batch.max_seqlen_k) == (most, max(lengths))


def test_blocks_that_lie_nowhere_are_written_nowhere_and_read_anywhere() -> None:
    chunk = _chunk(random.Random(1), "r")
    assert chunk.sequence.table is not None
    chunk.sequence.table.blocks = [[-1] * 20, [-1] * 20]
    step = step_arrays([chunk], num_groups=GROUPS, block_size=SIZE, steady=True).send(CPU)
    for batch in step.groups:
        assert bool((batch.slot_mapping < 0).all())
        assert bool((batch.block_tables == 0).all())


def test_arrays_of_a_buffer_are_aligned_apart_and_the_same_on_both_sides() -> None:
    source = np.random.default_rng(0)
    arrays: list[Any] = [
        source.integers(0, 100, shape).astype(dtype)
        for shape, dtype in [((3,), np.int64), ((1,), np.int32), ((0, 5), np.int64),
                             ((2, 7), np.int32), ((5,), np.bool_), ((2, 3, 4), np.int64)]
    ]  # fmt: skip
    layout = Layout([(array.shape, array.dtype) for array in arrays])
    buffer = torch.full((layout.nbytes,), 0x55, dtype=torch.uint8)
    for place, array in zip(layout.arrays(buffer), arrays, strict=True):
        place[...] = array
    tensors = layout.tensors(buffer.clone())
    for tensor, sent, array in zip(tensors, send_all(arrays, CPU), arrays, strict=True):
        assert np.array_equal(tensor.numpy(), array)
        assert np.array_equal(sent.numpy(), array)
        assert tensor.shape == array.shape
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0
