"""FastV, PyramidDrop and DART inside the decoder.

FastV: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024. PyramidDrop: Xing et
al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", CVPR 2025. DART: Wen et al., EMNLP 2025.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from epd_pruning.dart import least_duplicated
from epd_pruning.errors import PruningError
from epd_pruning.layer_base import LayerBatch, LayerInputs, LayerPruner
from epd_pruning.schedule import Schedule
from epd_pruning.selection import at_least_fp32, cosine_matrix

__all__ = ["DartLayer", "FastV", "PyramidDrop"]


@dataclass(frozen=True)
class FastV(LayerPruner):
    """The last prompt token's attention, averaged over heads, once: before layer K (K = 2)."""

    name: ClassVar[str] = "fastv"
    presets: ClassVar[Mapping[str, Schedule]] = {
        "llava-1.5-7b/192": Schedule((1,), (166,)),
        "llava-1.5-7b/128": Schedule((1,), (98,)),
        "llava-1.5-7b/64": Schedule((1,), (30,)),
    }


@dataclass(frozen=True)
class PyramidDrop(LayerPruner):
    """The same vote by queries and keys of the next layer, after each quarter but the last."""

    name: ClassVar[str] = "pyramiddrop"
    reads: ClassVar[Literal["own", "next"]] = "next"
    presets: ClassVar[Mapping[str, Schedule]] = {
        "llava-1.5-7b/270": Schedule((7, 15, 23), ratios=(0.5, 0.25, 0.125), of="original"),
    }


@dataclass(frozen=True)
class DartLayer(LayerPruner):
    """Image pivots by the L1 norm of their keys; cosines of the hidden states. No text pivots."""

    name: ClassVar[str] = "dart_layer"
    reads_hidden: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Schedule]] = FastV.presets

    num_pivots: int = 10

    def __post_init__(self) -> None:
        if self.num_pivots < 1:
            raise PruningError("num_pivots", "at least 1", self.num_pivots)

    def rate(self, batch: LayerBatch) -> Tensor:
        if batch.hidden is None:
            raise PruningError("hidden", "given: the method reads it", None)
        rating = torch.full((1, batch.keys.shape[0]), -math.inf, device=batch.keys.device)
        for span, rows in batch.vision_rows():
            order = self._order(batch.keys[rows], batch.hidden[rows], span.keep)
            rating[0, rows[order]] = -torch.arange(order.shape[0], device=rows.device).float()
        return rating

    def order(self, inputs: LayerInputs, num_kept: int) -> Tensor:
        if inputs.hidden is None:
            raise PruningError("hidden", "given: the method reads it", None)
        keys = inputs.keys[:, inputs.vision].transpose(0, 1)
        return self._order(keys, inputs.hidden[inputs.vision], num_kept)

    def _order(self, keys: Tensor, hidden: Tensor, num_kept: int) -> Tensor:
        """Indices of the vision rows whose `keys` [V, H_kv, d] and `hidden` [V, D] these are."""
        strength = at_least_fp32(keys).abs().sum((1, 2))
        return least_duplicated(cosine_matrix(hidden), strength, num_kept, self.num_pivots)
