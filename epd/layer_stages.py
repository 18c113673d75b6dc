"""Pruning between decoder layers: run to a pruning layer, let it choose, go on with the survivors.

How many rows every layer group computes is known before the step; only which ones is decided on the
device, and nothing is read back for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from epd.models.context import ForwardContext, Tap
from epd.models.decoder import Decoder, Stream
from epd.scheduler import Chunk
from epd_pruning.layer_base import LayerInputs, LayerPruner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    IntArray = np.ndarray[Any, np.dtype[np.int64 | np.int32]]

__all__ = ["LayerStages", "send"]


def send(array: IntArray, device: torch.device) -> torch.Tensor:
    """`array` on `device`, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":  # from pinned memory the copy does not wait for the GPU
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


@dataclass(slots=True)
class _Prompt:
    """A prompt on its way through the layer groups.

    `vision` and `others` are the rows of its prompt in the present group, increasing.
    """

    chunk: Chunk
    vision: torch.Tensor
    others: torch.Tensor
    raters: torch.Tensor | None

    @property
    def num_rows(self) -> int:
        return self.vision.shape[0] + self.others.shape[0]

    def keep(self, vision: torch.Tensor) -> torch.Tensor:
        """Go on with these vision rows; the rows that stay, increasing."""
        rows = torch.cat([self.others, vision]).sort().values
        self.vision = torch.searchsorted(rows, vision)
        self.others = torch.searchsorted(rows, self.others)
        return rows


class LayerStages:
    """Runs the decoder group by group where a step holds prompts that are pruned inside it."""

    def __init__(self, decoder: Decoder, pruner: LayerPruner) -> None:
        self._decoder = decoder
        self._pruner = pruner

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        context: ForwardContext,
        chunks: Sequence[Chunk],
    ) -> torch.Tensor:
        """Normed hidden states of the rows that reach the end: `[T', hidden]`, chunk by chunk."""
        stream, start = Stream(None, hidden), 0
        prompts = self._prompts(hidden, chunks)
        for stage, layer in enumerate(self._pruner.schedule.layers):
            tap = Tap(layer)
            tapped = replace(context, tap=tap)
            stream = self._decoder.advance(stream, positions, tapped, start, layer + 1)
            rows = self._survivors(stage, stream, positions, tap, chunks, prompts)
            if rows is not None:
                stream, positions = stream.take(rows), positions[rows]
            start = layer + 1
        depth = len(self._decoder.layers)
        return self._decoder.finish(self._decoder.advance(stream, positions, context, start, depth))

    def _prompts(self, hidden: torch.Tensor, chunks: Sequence[Chunk]) -> dict[int, _Prompt]:
        """What is to be pruned, by its place in the batch."""
        prompts, first = {}, 0
        for index, chunk in enumerate(chunks):
            if chunk.dropped:
                prompts[index] = self._prompt(hidden[first : first + chunk.length], chunk)
            first += chunk.length
        return prompts

    def _prompt(self, hidden: torch.Tensor, chunk: Chunk) -> _Prompt:
        sequence = chunk.sequence
        assert sequence.schedule is not None
        is_vision = np.zeros(sequence.num_prompt, np.bool_)
        for span in sequence.spans:
            is_vision[span.start : span.stop] = True
        vision = send(np.flatnonzero(is_vision), hidden.device)
        others = send(np.flatnonzero(~is_vision), hidden.device)
        text = hidden[sequence.num_prompt - sequence.text_after_images : sequence.num_prompt]
        raters = self._pruner.choose_raters(hidden[vision], text)
        return _Prompt(chunk, vision, others, raters)

    def _survivors(
        self,
        stage: int,
        stream: Stream,
        positions: torch.Tensor,
        tap: Tap,
        chunks: Sequence[Chunk],
        prompts: dict[int, _Prompt],
    ) -> torch.Tensor | None:
        """Rows of the step that go on after `stage`, increasing; None if all do."""
        before = np.array([chunk.rows(stage) for chunk in chunks])
        after = np.array([chunk.rows(stage + 1) for chunk in chunks])
        if (before == after).all():
            return None
        ends, new_ends = before.cumsum(), after.cumsum()
        # the last rows of each sequence; then the prompts that prune say which of theirs stay
        tails = [np.arange(end - count, end) for end, count in zip(ends, after, strict=True)]
        rows = send(np.concatenate(tails), positions.device)
        pruning = [index for index in prompts if before[index] > after[index]]
        firsts = [int(ends[index] - before[index]) for index in pruning]
        asked = [
            self._inputs(prompts[index], stream, positions, tap, first)
            for index, first in zip(pruning, firsts, strict=True)
        ]
        leaving = [int(before[index] - after[index]) for index in pruning]
        counts = [len(a.vision) - gone for a, gone in zip(asked, leaving, strict=True)]
        chosen = self._pruner.choose_all(asked, counts)
        for index, first, kept, count in zip(pruning, firsts, chosen, counts, strict=True):
            assert kept.vision.shape[0] == count
            stay = prompts[index].keep(kept.vision)
            start = int(new_ends[index] - after[index])
            rows[start : start + stay.shape[0]] = first + stay
        return rows

    def _inputs(
        self, prompt: _Prompt, stream: Stream, positions: torch.Tensor, tap: Tap, first: int
    ) -> LayerInputs:
        """What the method sees of a prompt, whose rows begin at `first` in the step."""
        sequence, length = prompt.chunk.sequence, prompt.num_rows
        here = slice(first, first + length)
        mine = stream.take(here)
        if self._pruner.reads == "next":
            queries, keys = self._decoder.queries_keys(mine, positions[here], tap.layer + 1)
        else:
            assert tap.queries is not None
            assert tap.keys is not None
            queries, keys = tap.queries[here], tap.keys[here]
        asking = length - sequence.text_after_images
        return LayerInputs(
            queries=queries[asking:].transpose(0, 1),
            keys=keys.transpose(0, 1),
            vision=prompt.vision,
            text=torch.arange(asking, length, device=positions.device),
            scale=self._decoder.config.head_dim**-0.5,
            hidden=mine.total() if self._pruner.reads_hidden else None,
            raters=prompt.raters,
        )
