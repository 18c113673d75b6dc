"""Controls that every table carries: what pruning buys without looking at the image."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from epd_pruning.base import ImagePruner, VisionInputs
from epd_pruning.errors import PruningError
from epd_pruning.selection import at_least_fp32, group_sums, spread

__all__ = ["LowResolution", "Random", "UniformStride"]


@dataclass(frozen=True)
class Random(ImagePruner):
    """A uniform random subset, the same for the same image and seed on every device."""

    name: ClassVar[str] = "random"

    seed: int = 0

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}:{inputs.seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(inputs.num_tokens, generator=generator).to(inputs.device)


@dataclass(frozen=True)
class UniformStride(ImagePruner):
    """Evenly spaced tokens of the raster sequence."""

    name: ClassVar[str] = "uniform_stride"
    prefix: ClassVar[bool] = False

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        return spread(inputs.num_tokens, count, inputs.device)


@dataclass(frozen=True)
class LowResolution(ImagePruner):
    """A coarser grid of the image's own aspect; what the budget leaves over is spread evenly.

    With `merging` each grid token becomes the mean of its cell: what a smaller input image tells,
    short of encoding one. Needs `grid`, or a square number of tokens.
    """

    name: ClassVar[str] = "low_resolution"
    prefix: ClassVar[bool] = False

    merging: bool = True

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        rows, columns = _grid(inputs)
        coarse = _coarse(rows, columns, count)
        down = spread(rows, coarse[0], inputs.device)
        right = spread(columns, coarse[1], inputs.device)
        centres = (down[:, None] * columns + right).flatten()
        free = torch.ones(inputs.num_tokens, dtype=torch.bool, device=inputs.device)
        free[centres] = False
        rest = free.nonzero()[:, 0]
        left = spread(rest.shape[0], count - centres.shape[0], inputs.device)
        return torch.cat([centres, rest[left]])

    def merge(self, inputs: VisionInputs, order: Tensor, pooled: VisionInputs) -> VisionInputs:
        if not self.merging:
            return pooled
        rows, columns = _grid(inputs)
        coarse = _coarse(rows, columns, order.shape[0])
        cell = _cell_of(rows, coarse[0], inputs.device)[:, None] * coarse[1]
        cell = (cell + _cell_of(columns, coarse[1], inputs.device)).flatten()
        num_cells = coarse[0] * coarse[1]
        sums, sizes = group_sums(at_least_fp32(inputs.embeddings), cell, num_cells)
        merged = pooled.embeddings.clone()
        places = torch.searchsorted(order.sort().values, order[:num_cells])
        merged[places] = (sums / sizes[:, None]).to(merged.dtype)
        return replace(pooled, embeddings=merged)


def _cell_of(length: int, cells: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device) * cells // length


def _grid(inputs: VisionInputs) -> tuple[int, int]:
    if inputs.grid is not None:
        return inputs.grid
    side = math.isqrt(inputs.num_tokens)
    if side * side != inputs.num_tokens:
        raise PruningError("grid", "given: the tokens are no square", inputs.num_tokens)
    return side, side


def _coarse(rows: int, columns: int, count: int) -> tuple[int, int]:
    """The largest grid of at most `count` cells whose sides shrink alike."""
    shrink = math.sqrt(count / (rows * columns))
    down = min(max(round(rows * shrink), 1), rows, count)
    right = min(count // down, columns)
    return down, right
