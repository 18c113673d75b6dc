"""Lone prompts as recordings: one per count of tokens and bound on length, on static buffers.

A prompt of a thousand tokens keeps a GPU busy for less time than a host needs to launch some 25
kernels per layer one by one. The prompt is padded with a second sequence that has no KV: its
queries see nothing, and its tokens are written nowhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from epd.decode_graphs import length_bounds, table_width
from epd.models.context import AttentionBatch, ForwardContext
from epd.recordings import Recordings
from epd.staging import Layout
from epd.step_arrays import StepArrays
from epd_kernels.embed_tokens import embed_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from epd.graphs import Recorder
    from epd.kv.pool import KVPool
    from epd.models.decoder import Decoder
    from epd.scheduler import Chunk
    from epd.staging import HostArray

__all__ = ["PromptGraphs", "prompt_sizes"]

_INT64: np.dtype[Any] = np.dtype(np.int64)
_INT32: np.dtype[Any] = np.dtype(np.int32)
_LARGEST = 1024
_STEP = 128


def prompt_sizes(most: int) -> list[int]:
    """16, 32, 64, then multiples of 128 up to `most` or 1,024, whichever is less."""
    wanted = [16, 32, 64, *range(_STEP, _LARGEST + 1, _STEP)]
    return [size for size in wanted if size <= most]


class PromptGraphs:
    """Runs steps of one chunk of a prompt, up to 1,024 tokens. Call `record` or `defer` before."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        recorder: Recorder,
        *,
        layer_group: tuple[int, ...],
        max_tokens: int,
        max_model_len: int,
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._layer_group = layer_group
        self._sizes = prompt_sizes(min(max_tokens, max_model_len))
        self._bounds = length_bounds(max_model_len)
        self._recordings = None
        if self._sizes:
            # large ones first: smaller ones find their scratch in what those left
            shapes = [(n, m) for n in self._sizes[::-1] for m in self._bounds[::-1] if n <= m]
            self._recordings = Recordings(recorder, shapes, layout=self._layout, make=self._step)
            device, hidden = recorder.device, decoder.config.hidden_size
            self._vision = torch.zeros(
                self._sizes[-1], hidden, dtype=decoder.dtype, device=device
            )  # fmt: skip
            shape = (1, decoder.config.vocab_size)
            self._logits = torch.zeros(shape, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def record(self, max_bytes: int) -> int:
        """How many shapes were recorded, as `max_bytes` allow. The others run call by call."""
        if self._recordings is None:
            return 0
        return self._recordings.record("prompt", max_bytes, self._clear)

    def defer(self, max_bytes: int) -> None:
        """Record each shape when it is first needed."""
        if self._recordings is not None:
            self._recordings.defer(max_bytes)

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether the step is one chunk of several tokens, few enough, after which one is sampled.

        Nothing may be pruned inside the decoder.
        """
        if self._recordings is None or not self._recordings.ready or len(chunks) > 1:
            return False
        chunk = chunks[0]
        return 1 < chunk.length <= self._sizes[-1] and chunk.samples and not chunk.dropped

    def run(self, step: StepArrays, vision: Sequence[torch.Tensor]) -> torch.Tensor:
        """fp32 logits `[1, vocab]` after the step; the next one overwrites them."""
        assert self._recordings is not None
        longest = max(int(group.lengths[0]) for group in step.groups)
        size = next(n for n in self._sizes if n >= len(step.ids))
        bound = next(n for n in self._bounds if n >= max(longest, size))
        if vision:
            torch.cat(list(vision), out=self._vision[: sum(map(len, vision))])
        self._recordings.run((size, bound), lambda arrays: _fill(arrays, step))
        return self._logits

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        """Ids, positions, sources, the last row; per group bounds, lengths, tables and slots."""
        size, bound = shape
        row: tuple[tuple[int, ...], np.dtype[Any]] = ((size,), _INT64)
        width = table_width(bound, self._pool.block_size)
        group = [((3,), _INT32), ((2,), _INT32), ((2, width), _INT32), row]
        groups = group * (max(self._layer_group) + 1)
        return Layout([row, row, ((size,), _INT32), ((1,), _INT64), *groups])

    def _step(self, shape: tuple[int, ...], inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        """The step of `shape`, to be called."""
        size, bound = shape
        ids, positions, sources, last, *rest = inputs
        groups = tuple(
            AttentionBatch(
                cu_seqlens_q=rest[at], seq_lens=rest[at + 1], block_tables=rest[at + 2],
                slot_mapping=rest[at + 3], max_seqlen_q=size, max_seqlen_k=bound,
            )
            for at in range(0, len(rest), 4)
        )  # fmt: skip
        context = ForwardContext(groups=groups, layer_group=self._layer_group, kv=self._pool)

        def step() -> None:
            hidden = embed_tokens(ids, self._decoder.embedding, self._vision, sources)
            hidden = self._decoder.forward(hidden, positions, context)
            self._logits.copy_(self._decoder.logits(hidden[last]))

        return step

    def _clear(self, arrays: Sequence[HostArray]) -> None:
        """Inputs of no prompt at all."""
        ids, positions, sources, last, *rest = arrays
        for array in (ids, positions, last):
            array.fill(0)
        sources.fill(-1)
        for at in range(0, len(rest), 4):
            starts, lengths, tables, slots = rest[at : at + 4]
            starts[:] = (0, 0, len(ids))
            lengths.fill(0)
            tables.fill(0)
            slots.fill(-1)


def _fill(arrays: Sequence[HostArray], step: StepArrays) -> None:
    """Write a step into the host's buffer."""
    ids, positions, sources, last, *rest = arrays
    count = len(step.ids)
    for array, given, padding in (
        (ids, step.ids, 0), (positions, step.positions, 0), (sources, step.sources, -1),
    ):  # fmt: skip
        array[:count], array[count:] = given, padding
    last[0] = count - 1
    for at, group in enumerate(step.groups):
        starts, lengths, tables, slots = rest[4 * at : 4 * at + 4]
        starts[:] = (0, count, len(ids))
        lengths[:] = (group.lengths[0], 0)
        tables[0, : group.tables.shape[1]] = group.tables[0, : tables.shape[1]]
        slots[:count], slots[count:] = group.slots, -1
