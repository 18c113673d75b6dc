"""DivPrune: the subset whose nearest pair is as far apart as a greedy choice can make it.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR
2025; written from the max-min formulation of the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from epd_pruning.base import ImagePruner, VisionInputs
from epd_pruning.selection import cosine_matrix

__all__ = ["DivPrune", "farthest_points"]


def farthest_points(distance: Tensor, count: int) -> Tensor:
    """Indices [count] in order of choice under `distance` [N, N]; ties to the lowest index.

    First the token farthest from its nearest neighbour, then always the one farthest from the set.
    """
    size = distance.shape[0]
    alone = distance.masked_fill(
        torch.eye(size, dtype=torch.bool, device=distance.device), math.inf
    )
    chosen = alone.amin(1).argmax().view(1)
    order, nearest = [chosen], torch.full_like(distance[0], math.inf)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distance.index_select(0, chosen)[0])
        nearest = nearest.index_fill(0, chosen, -math.inf)
        chosen = nearest.argmax().view(1)
        order.append(chosen)
    return torch.cat(order)


@dataclass(frozen=True)
class DivPrune(ImagePruner):
    """Farthest-point choice on the embeddings, distance 1 − cosine."""

    name: ClassVar[str] = "divprune"

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        return farthest_points(1 - cosine_matrix(inputs.embeddings), count)

    def macs(self, num_tokens: int, num_kept: int, width: int) -> int:
        return num_tokens * num_tokens * width
