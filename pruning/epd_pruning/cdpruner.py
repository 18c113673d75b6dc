"""CDPruner: diversity conditioned by the question, and the same without the question.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs", NeurIPS 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from epd_pruning.base import ImagePruner, VisionInputs
from epd_pruning.dpp import greedy_dpp
from epd_pruning.relevance import ConditionedPruner
from epd_pruning.selection import cosine_matrix

__all__ = ["CDPruner", "Diverse"]


@dataclass(frozen=True)
class CDPruner(ConditionedPruner):
    """Greedy MAP of the DPP with kernel diag(r)·S·diag(r), S the cosines of the embeddings.

    Relevance is min-maxed per crop; the release does it over all crops of a batch together, which
    lets neighbours change the answer and is left out. `relevance_form="offset"` is its other quirk.
    """

    name: ClassVar[str] = "cdpruner"

    def rank_query(self, inputs: VisionInputs, num_kept: int) -> Tensor:
        similarity = cosine_matrix(inputs.embeddings)
        return greedy_dpp(similarity, num_kept, relevance=self.relevance(inputs)).indices

    def macs(self, num_tokens: int, num_kept: int, width: int) -> int:
        return num_tokens * num_tokens * width + num_tokens * num_kept * num_kept


@dataclass(frozen=True)
class Diverse(ImagePruner):
    """The query-blind greedy DPP on the cosines of the embeddings."""

    name: ClassVar[str] = "dpp"

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        return greedy_dpp(cosine_matrix(inputs.embeddings), count).indices

    def macs(self, num_tokens: int, num_kept: int, width: int) -> int:
        return num_tokens * num_tokens * width + num_tokens * num_kept * num_kept
