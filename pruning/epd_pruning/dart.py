"""DART: a few pivots, and for each the tokens that resemble it least.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
More", EMNLP 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from epd_pruning.base import ImagePruner, VisionInputs
from epd_pruning.errors import PruningError
from epd_pruning.selection import at_least_fp32, cosine_matrix, stable_top_k

__all__ = ["Dart", "least_duplicated"]


def least_duplicated(similarity: Tensor, strength: Tensor, count: int, num_pivots: int) -> Tensor:
    """Indices [count]: the strongest tokens as pivots, then for each what is least like it.

    `similarity` [N, N], `strength` [N]. The `num_pivots` pivots, at most half of the budget, count
    towards it (published code goes over it by them); what is left is split evenly, the first
    pivots taking the remainder, and each in turn takes its share of the tokens not yet taken.
    """
    pivots = stable_top_k(strength, min(num_pivots, max(count // 2, 1)))
    share, extra = divmod(count - pivots.shape[0], pivots.shape[0])
    distinct = -similarity.index_fill(1, pivots, torch.inf)
    order = [pivots]
    for place in range(pivots.shape[0]):
        taken = stable_top_k(distinct[pivots[place]], share + (place < extra))
        distinct = distinct.index_fill(1, taken, -torch.inf)
        order.append(taken)
    return torch.cat(order)


@dataclass(frozen=True)
class Dart(ImagePruner):
    """The variant before the LLM: pivots by the L1 norm of the embeddings, cosines of the same."""

    name: ClassVar[str] = "dart"
    prefix: ClassVar[bool] = False

    num_pivots: int = 10

    def __post_init__(self) -> None:
        if self.num_pivots < 1:
            raise PruningError("num_pivots", "at least 1", self.num_pivots)

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        strength = at_least_fp32(inputs.embeddings).abs().sum(1)
        return least_duplicated(cosine_matrix(inputs.embeddings), strength, count, self.num_pivots)

    def macs(self, num_tokens: int, num_kept: int, width: int) -> int:
        return num_tokens * min(self.num_pivots, num_kept) * width
