"""The vision tower as recordings, one per small batch of images.

A picture or two keep a GPU busy for less time than a host needs to launch some 400 kernels.
Batches beyond those recorded, whose arithmetic takes longer than that, are launched one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from epd.graphs import Recorder

    Tower = Callable[[torch.Tensor], list[torch.Tensor]]

__all__ = ["TowerGraphs"]

_BATCHES = (8, 6, 4, 3, 2, 1)  # later ones find their scratch in what the first left


class TowerGraphs:
    """`tower` takes pixels `[N, ...]` to tensors `[N, ...]`; `shape` is that of one image's pixels.

    One thread calls it, on the stream that was current when it was made.
    """

    def __init__(
        self, tower: Tower, recorder: Recorder, *, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._pixels = torch.zeros(_BATCHES[0], *shape, dtype=dtype, device=recorder.device)
        self._tower = tower
        self._recorder = recorder
        self._recordings: dict[int, tuple[Callable[[], None], list[torch.Tensor]]] = {}

    def record(self) -> None:
        """Record every batch; otherwise each is when it is first needed."""
        for batch in _BATCHES:
            self._recordings[batch] = self._recorded(batch)

    def run(self, pixels: torch.Tensor) -> list[torch.Tensor] | None:
        """What the tower makes of `pixels`, overwritten by the next call; None if too many."""
        count = len(pixels)
        if count > _BATCHES[0]:
            return None
        batch = min(size for size in _BATCHES if size >= count)
        self._pixels[:count].copy_(pixels, non_blocking=True)
        if batch not in self._recordings:
            self._recordings[batch] = self._recorded(batch)
        repeat, states = self._recordings[batch]
        repeat()
        return [state[:count] for state in states]

    def _recorded(self, batch: int) -> tuple[Callable[[], None], list[torch.Tensor]]:
        states: list[torch.Tensor] = []

        def step() -> None:
            # the graph writes where its recording wrote: the tensors of the last call are those
            states[:] = self._tower(self._pixels[:batch])

        return self._recorder.record(step), states
