"""Pruning between decoder layers: run to a pruning layer, let it choose, go on with the survivors.

How many rows every layer group computes is known before the step, and sent in one piece; only which
ones is decided on the device, for all requests at once, and nothing is read back for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from epd.models.context import ForwardContext, Tap
from epd.models.decoder import Decoder, Stream
from epd.scheduler import Chunk
from epd.staging import send
from epd_kernels.text_votes import Span, Spans
from epd_pruning.layer_base import LayerBatch, LayerPruner, rater_shares

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LayerStages"]


@dataclass(slots=True)
class _Rows:
    """The rows of a step that are left, on the device: T of them.

    `raters` [T], where the method has them, is the vote of each row.
    """

    stream: Stream
    positions: torch.Tensor
    is_vision: torch.Tensor
    raters: torch.Tensor | None

    def take(self, rows: torch.Tensor, is_vision: torch.Tensor) -> _Rows:
        """Some of them, which of these are vision being known."""
        raters = None if self.raters is None else self.raters[rows]
        return _Rows(self.stream.take(rows), self.positions[rows], is_vision, raters)


class _Piece(NamedTuple):
    """`length` rows: those of a prompt to be pruned, `vision` of them images, or any others.

    The last `text` of them follow the images; `dropped` is that of the chunk.
    """

    length: int
    vision: int = 0
    text: int = 0
    dropped: tuple[int, ...] = ()

    def gone(self, group: int) -> int:
        """Rows that are dropped before layer group `group`."""
        return self.dropped[group] if self.dropped else 0


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the host knows of a stage."""

    spans: Spans
    num_vision: tuple[int, ...]
    num_rows: int


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
        rows, start = self._rows(hidden, positions, chunks), 0
        stages = self._stages(chunks, hidden.device)
        for layer, stage in zip(self._pruner.schedule.layers, stages, strict=True):
            if stage is None:
                continue
            tap = Tap(layer)
            tapped = replace(context, tap=tap)
            rows.stream = self._decoder.advance(
                rows.stream, rows.positions, tapped, start, layer + 1
            )
            rows = self._survivors(stage, rows, tap)
            start = layer + 1
        depth = len(self._decoder.layers)
        stream = self._decoder.advance(rows.stream, rows.positions, context, start, depth)
        return self._decoder.finish(stream)

    def _rows(
        self, hidden: torch.Tensor, positions: torch.Tensor, chunks: Sequence[Chunk]
    ) -> _Rows:
        """The rows of the step as it begins; vision is what its prompt may lose."""
        is_vision, first = np.zeros(len(hidden), np.bool_), 0
        votes = torch.zeros(len(hidden) if self._pruner.has_raters else 0, device=hidden.device)
        for chunk in chunks:
            sequence = chunk.sequence
            for span in sequence.spans if chunk.dropped else ():
                is_vision[first + span.start : first + span.stop] = True
            if chunk.dropped and self._pruner.has_raters:
                end = first + sequence.num_prompt
                text = slice(end - sequence.text_after_images, end)
                vision = send(first + np.flatnonzero(is_vision[first:end]), hidden.device)
                raters = self._pruner.choose_raters(hidden[vision], hidden[text])
                assert raters is not None
                votes[text] = rater_shares(raters)
            first += chunk.length
        kinds = send(is_vision, hidden.device)
        return _Rows(Stream(None, hidden), positions, kinds, votes if len(votes) else None)

    def _stages(self, chunks: Sequence[Chunk], device: torch.device) -> list[_Stage | None]:
        """All stages of the step, None where nothing is pruned; their tables in one transfer."""
        pieces = [piece for chunk in chunks for piece in _pieces(chunk)]
        count = len(self._pruner.schedule.layers)
        spans = [self._spans(pieces, stage) for stage in range(count)]
        tables = np.array([[(*one, 0, 0) for one in mine] for mine in spans], np.int32)
        stages: list[_Stage | None] = []
        for stage, (mine, table) in enumerate(zip(spans, send(tables, device), strict=True)):
            vision = tuple(piece.vision - piece.gone(stage) for piece in pieces)
            num_rows = sum(piece.length - piece.gone(stage + 1) for piece in pieces)
            idle = num_rows == mine[-1].stop
            stages.append(None if idle else _Stage(Spans(tuple(mine), table), vision, num_rows))
        return stages

    def _spans(self, pieces: Sequence[_Piece], stage: int) -> list[Span]:
        """Where each piece lies before `stage`, who of it votes, and where it goes."""
        spans, start, place = [], 0, 0
        for piece in pieces:
            gone, then_gone = piece.gone(stage), piece.gone(stage + 1)
            stop = start + piece.length - gone
            voters = self._pruner.num_voters(piece.text) if then_gone > gone else 0
            keep = piece.vision - then_gone
            spans.append(Span(stop - voters, voters, start, stop, keep, place))
            start, place = stop, place + piece.length - then_gone
        return spans

    def _survivors(self, stage: _Stage, rows: _Rows, tap: Tap) -> _Rows:
        """The rows that go on after `stage`."""
        return rows.take(*self._pruner.keep_rows(self._batch(stage, rows, tap), stage.num_rows))

    def _batch(self, stage: _Stage, rows: _Rows, tap: Tap) -> LayerBatch:
        """What the method sees of the rows before `stage`."""
        if self._pruner.reads == "next":
            queries, keys = self._decoder.queries_keys(rows.stream, rows.positions, tap.layer + 1)
        else:
            assert tap.queries is not None
            assert tap.keys is not None
            queries, keys = tap.queries, tap.keys
        return LayerBatch(
            queries=queries, keys=keys, is_vision=rows.is_vision, spans=stage.spans,
            num_vision=stage.num_vision, scale=self._decoder.config.head_dim**-0.5,
            hidden=rows.stream.total() if self._pruner.reads_hidden else None, raters=rows.raters,
        )  # fmt: skip


def _pieces(chunk: Chunk) -> list[_Piece]:
    """The prompt and, where output is computed again with it, the output; else the chunk."""
    if not chunk.dropped:
        return [_Piece(chunk.length)]
    sequence, again = chunk.sequence, chunk.length - chunk.sequence.num_prompt
    prompt = _Piece(
        sequence.num_prompt, sequence.image_tokens, sequence.text_after_images, chunk.dropped
    )
    return [prompt, _Piece(again)] if again else [prompt]
