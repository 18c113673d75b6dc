"""One step on tensors: chunks in, sampled tokens out. Knows no queue.

Every field of a step is one NumPy array and one transfer; nothing is read back but the sampled ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from epd.layer_stages import LayerStages, send
from epd.models.context import AttentionBatch, ForwardContext
from epd.sampler import SampleRow, sample

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from epd.kv.blocks import BlockTable
    from epd.kv.pool import KVPool
    from epd.models.decoder import Decoder
    from epd.request import TokenOutput
    from epd.scheduler import Chunk
    from epd_pruning.layer_base import LayerPruner

    IntArray = np.ndarray[Any, np.dtype[np.int64 | np.int32]]

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs chunks through the decoder. Holds the vision tokens of requests that may need them."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        *,
        layer_group: tuple[int, ...],
        device: torch.device | str,
        layer_pruner: LayerPruner | None = None,
    ) -> None:
        self._decoder = decoder
        self._stages = LayerStages(decoder, layer_pruner) if layer_pruner is not None else None
        self._pool = pool
        self._layer_group = layer_group
        self._device = torch.device(device)
        self._vision: dict[str, list[torch.Tensor]] = {}

    def hold_vision(self, request_id: str, tokens: Sequence[torch.Tensor]) -> None:
        """Keep the vision tokens of a request, one [tokens, hidden] per image."""
        if tokens:
            self._vision[request_id] = [image.to(self._device) for image in tokens]

    def drop_vision(self, request_id: str) -> None:
        """Forget them; idempotent."""
        self._vision.pop(request_id, None)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[TokenOutput | None]:
        """The next token of each chunk that samples, in order; None where logits are not finite.

        Idempotent until the chunks are advanced: the same slots are written with the same values.
        """
        positions, hidden = self._positions(chunks), self._embed(chunks)
        context = self._context(chunks)
        if self._stages is not None and any(chunk.dropped for chunk in chunks):
            hidden = self._stages.forward(hidden, positions, context, chunks)
        else:
            hidden = self._decoder.forward(hidden, positions, context)
        ends = np.cumsum([chunk.rows(self._layer_group[-1]) for chunk in chunks]) - 1
        last = [int(end) for end, chunk in zip(ends, chunks, strict=True) if chunk.samples]
        if not last:
            return []
        if len(last) < len(hidden):
            hidden = hidden[self._send(np.asarray(last, np.int64))]
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        rows = [SampleRow(s.sampling, s.tokens, s.num_prompt) for s in sequences]
        return sample(self._decoder.logits(hidden), rows)

    def _send(self, array: IntArray) -> torch.Tensor:
        return send(array, self._device)

    def _positions(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Position of every token of the step, int64 [T]."""
        flat: list[int] = []
        for chunk in chunks:
            flat.extend(chunk.sequence.upcoming(chunk.length))
        return self._send(np.array(flat, np.int64))

    def _embed(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Decoder inputs [T, hidden]: token embeddings, vision tokens where an image stands."""
        flat: list[int] = []
        places: list[tuple[int, torch.Tensor]] = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.num_computed
            stop, row = start + chunk.length, len(flat)
            flat += sequence.tokens[start:stop]
            for image, span in enumerate(sequence.spans):
                low, high = max(span.start, start), min(span.stop, stop)
                if low < high:
                    tokens = self._vision[sequence.request_id][image]
                    at = row + low - start
                    places.append((at, tokens[low - span.start : high - span.start]))
                    # the placeholder may lie outside the embedding table
                    flat[at : at + high - low] = [0] * (high - low)
        hidden = self._decoder.embed(self._send(np.array(flat, np.int64)))
        for at, tokens in places:
            hidden[at : at + len(tokens)] = tokens
        return hidden

    def _context(self, chunks: Sequence[Chunk]) -> ForwardContext:
        """Block tables, slots and lengths of the step, per layer group."""
        tables: list[BlockTable] = []
        for chunk in chunks:
            assert chunk.sequence.table is not None
            tables.append(chunk.sequence.table)
        pruned = any(chunk.dropped for chunk in chunks)
        groups: list[AttentionBatch] = []
        for group in range(max(self._layer_group) + 1):
            if pruned or not groups:
                lengths = np.array([chunk.rows(group) for chunk in chunks], np.int64)
                starts = np.zeros(len(chunks) + 1, np.int32)
                np.cumsum(lengths, out=starts[1:])
                cu_seqlens = self._send(starts)
            groups.append(self._batch(tables, group, cu_seqlens=cu_seqlens, lengths=lengths))
        return ForwardContext(groups=tuple(groups), layer_group=self._layer_group, kv=self._pool)

    def _batch(
        self,
        tables: Sequence[BlockTable],
        group: int,
        *,
        cu_seqlens: torch.Tensor,
        lengths: IntArray,
    ) -> AttentionBatch:
        past = np.array([table.lengths[group] for table in tables], np.int64)
        widths = [len(table.blocks[group]) for table in tables]
        blocks = np.zeros((len(tables), max(widths)), np.int32)
        for row, (table, width) in enumerate(zip(tables, widths, strict=True)):
            blocks[row, :width] = table.blocks[group]
        # each token's place in its sequence, then in its block
        row_of = np.repeat(np.arange(len(tables)), lengths)
        firsts = np.cumsum(lengths) - lengths
        place = np.arange(len(row_of)) - firsts[row_of] + past[row_of]
        size = self._pool.block_size
        slots = blocks[row_of, place // size].astype(np.int64) * size + place % size
        total = past + lengths
        return AttentionBatch(
            cu_seqlens_q=cu_seqlens,
            seq_lens=self._send(total.astype(np.int32)),
            block_tables=self._send(blocks),
            slot_mapping=self._send(slots),
            max_seqlen_q=int(lengths.max()),
            max_seqlen_k=int(total.max()),
        )
