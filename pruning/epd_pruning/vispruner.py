"""VisPruner: tokens the encoder attends to, and what stays distinct among the others.

Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
VLMs", ICCV 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from epd_pruning.base import ImagePruner, VisionInputs
from epd_pruning.errors import PruningError
from epd_pruning.selection import at_least_fp32, cosine_matrix, stable_top_k

__all__ = ["VisPruner"]

# duplicates leave in steps of this size
STEP = 8


@dataclass(frozen=True)
class VisPruner(ImagePruner):
    """`important_share` of the budget by CLS attention, the rest by removing duplicates.

    Of the remaining tokens in raster order, the up to eight of even place that are most alike some
    token of odd place leave, again and again, until the budget holds. Similarity is the cosine of
    the encoder's states.
    """

    name: ClassVar[str] = "vispruner"
    prefix: ClassVar[bool] = False

    important_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.important_share <= 1.0:
            raise PruningError("important_share", "in [0, 1]", self.important_share)

    @property
    def image_needs(self) -> frozenset[str]:
        return frozenset({"cls_attention", "encoder_states"})

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        ranked = stable_top_k(at_least_fp32(inputs.require("cls_attention")), inputs.num_tokens)
        important = int(count * self.important_share)
        similarity = cosine_matrix(inputs.require("encoder_states"))
        diverse = _thin(similarity, ranked[important:].sort().values, count - important)
        return torch.cat([ranked[:important], diverse])

    def macs(self, num_tokens: int, num_kept: int, width: int) -> int:
        return num_tokens * num_tokens * width


def _thin(similarity: Tensor, rest: Tensor, count: int) -> Tensor:
    """`count` of the indices `rest`, after the duplicates among those of even place have left."""
    while (surplus := rest.shape[0] - count) > 0:
        even, odd = rest[0::2], rest[1::2]
        if odd.shape[0] == 0:
            return rest[:count]
        likeness = similarity[even][:, odd].amax(1)
        leaving = stable_top_k(likeness, min(STEP, surplus, even.shape[0]))
        stays = torch.ones_like(rest, dtype=torch.int8).index_fill_(0, 2 * leaving, 0)
        rest = rest[stable_top_k(stays, rest.shape[0] - leaving.shape[0])]
    return rest
