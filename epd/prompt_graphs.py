"""Steps with prompts as recordings: one per count of tokens, of sequences and bound on length.

A thousand tokens keep a GPU busy for less time than a host needs to launch some 25 kernels per
layer one by one, be they a prompt alone or some prompts beside sequences that decode. A step is
padded with sequences that have no KV; the last of them takes the padding tokens, whose queries see
nothing and which are written nowhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from epd.decode_graphs import length_bounds, table_width
from epd.models.context import AttentionBatch, ForwardContext
from epd.recordings import Recordings
from epd.sampler import likeliest
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

__all__ = ["PromptGraphs", "PromptShape", "prompt_sizes", "sequence_counts"]

_INT64: np.dtype[Any] = np.dtype(np.int64)
_INT32: np.dtype[Any] = np.dtype(np.int32)
_LARGEST, _STEP = 1024, 128
_FINE_LARGEST, _FINE_STEP = 512, 64
_SEQUENCES = (1, 8, 32, 64)


class PromptShape(NamedTuple):
    """Tokens and sequences of a step at most, and positions that no sequence of it exceeds."""

    tokens: int
    sequences: int
    bound: int


def prompt_sizes(most: int) -> list[int]:
    """16, 32, multiples of 64 up to 512, of 128 up to 1,024; none above `most`."""
    fine = range(_FINE_STEP, _FINE_LARGEST, _FINE_STEP)
    wanted = [16, 32, *fine, *range(_FINE_LARGEST, _LARGEST + 1, _STEP)]
    return [size for size in wanted if size <= most]


def sequence_counts(most: int) -> list[int]:
    """1, 8, 32, 64, up to `most`, which is the last if it is less."""
    most = min(most, _SEQUENCES[-1])
    return [*(count for count in _SEQUENCES if count < most), most]


class PromptGraphs:
    """Runs steps of up to 1,024 tokens of up to 64 sequences. Call `record` or `defer` before."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        recorder: Recorder,
        *,
        layer_group: tuple[int, ...],
        max_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._layer_group = layer_group
        self._sizes = prompt_sizes(max_tokens)
        self._counts = sequence_counts(min([max_num_seqs, *self._sizes[-1:]]))
        self._bounds = length_bounds(max_model_len)
        self._recordings = None
        if self._sizes:
            self._recordings = Recordings(
                recorder, self._shapes(), layout=self._layout, make=self._step
            )
            device, config = recorder.device, decoder.config
            rows = self._counts[-1]
            self._vision = torch.zeros(
                self._sizes[-1], config.hidden_size, dtype=decoder.dtype, device=device
            )  # fmt: skip
            self._logits = torch.zeros(rows, config.vocab_size, device=device)
            self._best = torch.zeros(rows, dtype=torch.int64, device=device)

    def _shapes(self) -> list[PromptShape]:
        """All of them; large ones first: smaller ones find their scratch in what those left."""
        return [
            PromptShape(tokens, count, bound)
            for count in self._counts
            for tokens in self._sizes[::-1]
            for bound in self._bounds[::-1]
            if count <= tokens <= self._size(min(count * self._bounds[-1], self._sizes[-1]))
        ]

    def _size(self, tokens: int) -> int:
        return next(size for size in self._sizes if size >= tokens)

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
        """Whether the step has a recorded size and nothing is pruned inside the decoder.

        A step of a single token is none: it is left to the kernels of its kind.
        """
        if self._recordings is None or not self._recordings.ready:
            return False
        tokens = sum(chunk.length for chunk in chunks)
        fits = 1 < tokens <= self._sizes[-1] and len(chunks) <= self._counts[-1]
        return fits and not any(chunk.dropped for chunk in chunks)

    def run(
        self, step: StepArrays, vision: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 logits `[S, vocab]` of the S rows that sample, and their best ids int64 `[S]`.

        An id is -1 where logits are not finite. The next step overwrites both.
        """
        assert self._recordings is not None
        if vision:
            torch.cat(list(vision), out=self._vision[: sum(map(len, vision))])
        self._recordings.run(self._shape(step), lambda arrays: _fill(arrays, step))
        rows = len(step.last)
        return self._logits[:rows], self._best[:rows]

    def _shape(self, step: StepArrays) -> PromptShape:
        """The least shape that holds the step."""
        longest = max(int(group.lengths.max()) for group in step.groups)
        count = next(n for n in self._counts if n >= len(step.groups[0].lengths))
        bound = next(n for n in self._bounds if n >= longest)
        return PromptShape(self._size(max(len(step.ids), count)), count, bound)

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        """Ids, positions, sources, sampled rows; per group bounds, lengths, tables and slots."""
        size, count, bound = shape
        row: tuple[tuple[int, ...], np.dtype[Any]] = ((size,), _INT64)
        tables = (count + 1, table_width(bound, self._pool.block_size))
        group = [((count + 2,), _INT32), ((count + 1,), _INT32), (tables, _INT32), row]
        groups = group * (max(self._layer_group) + 1)
        return Layout([row, row, ((size,), _INT32), ((count,), _INT64), *groups])

    def _step(self, shape: tuple[int, ...], inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        """The step of `shape`, to be called."""
        size, count, bound = shape
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
            logits = self._decoder.logits(hidden[last])
            self._best[:count].copy_(likeliest(logits))
            self._logits[:count].copy_(logits)

        return step

    def _clear(self, arrays: Sequence[HostArray]) -> None:
        """Inputs of no prompt at all."""
        ids, positions, sources, last, *rest = arrays
        for array in (ids, positions, last):
            array.fill(0)
        sources.fill(-1)
        for at in range(0, len(rest), 4):
            starts, lengths, tables, slots = rest[at : at + 4]
            starts[:-1], starts[-1] = 0, len(ids)
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
    last[: len(step.last)], last[len(step.last) :] = step.last, 0
    for at, group in enumerate(step.groups):
        starts, lengths, tables, slots = rest[4 * at : 4 * at + 4]
        rows = len(group.lengths)
        # every sequence but the last one of those that pad has no query at all
        starts[:rows], starts[rows:-1], starts[-1] = group.starts[:-1], count, len(ids)
        lengths[:rows], lengths[rows:] = group.lengths, 0
        width = min(group.tables.shape[1], tables.shape[1])
        tables[:rows, :width] = group.tables[:, :width]
        slots[:count], slots[count:] = group.slots, -1
