"""VisionZip: what the encoder itself looks at, plus evenly spaced context.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from epd_pruning.base import ImagePruner, VisionInputs
from epd_pruning.errors import PruningError
from epd_pruning.selection import at_least_fp32, cosine_matrix, group_sums, stable_top_k

__all__ = ["VisionZip"]


@dataclass(frozen=True)
class VisionZip(ImagePruner):
    """Dominant tokens by CLS attention; contextual ones at even steps through the rest.

    An encoder without CLS gives the mean attention each patch receives as `cls_attention`. The
    published CLS token among the dominant is not a patch and has no place here. `merging` adds to
    each contextual token the mean of the dropped tokens whose keys are nearest to its own, here
    on projected embeddings (published: before the projector).
    """

    name: ClassVar[str] = "visionzip"
    prefix: ClassVar[bool] = False

    contextual_share: float = 10 / 64
    merging: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.contextual_share <= 1.0:
            raise PruningError("contextual_share", "in [0, 1]", self.contextual_share)

    @property
    def image_needs(self) -> frozenset[str]:
        return frozenset({"cls_attention", "encoder_keys"} if self.merging else {"cls_attention"})

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        contextual = self._contextual(count)
        attention = at_least_fp32(inputs.require("cls_attention"))
        dominant = stable_top_k(attention, count - contextual)
        rest = _others(inputs, dominant)
        step = rest.shape[0] // max(contextual, 1)
        return torch.cat([dominant, rest[:: max(step, 1)][:contextual]])

    def merge(self, inputs: VisionInputs, order: Tensor, pooled: VisionInputs) -> VisionInputs:
        contextual = self._contextual(order.shape[0])
        if not self.merging or contextual == 0:
            return pooled
        targets, dropped = order[order.shape[0] - contextual :], _others(inputs, order)
        keys = inputs.require("encoder_keys")
        home = cosine_matrix(keys[dropped], keys[targets]).argmax(1)
        source = at_least_fp32(inputs.embeddings)
        sums, sizes = group_sums(source[dropped], home, contextual)
        merged = pooled.embeddings.clone()
        places = torch.searchsorted(order.sort().values, targets)
        merged[places] = (source[targets] + sums / sizes.clamp_min(1)[:, None]).to(merged.dtype)
        return replace(pooled, embeddings=merged)

    def _contextual(self, count: int) -> int:
        return min(round(count * self.contextual_share), count)


def _others(inputs: VisionInputs, chosen: Tensor) -> Tensor:
    """Indices that `chosen` leaves, in raster order."""
    taken = torch.zeros(inputs.num_tokens, dtype=torch.int8, device=inputs.device)
    return taken.index_fill_(0, chosen, 1).argsort(stable=True)[: -chosen.shape[0] or None]
