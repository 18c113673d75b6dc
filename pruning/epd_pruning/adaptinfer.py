"""AdaptInfer: at every stage the text itself decides which text is worth listening to.

"AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text
Guidance", arXiv 2508.06084.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from epd_kernels.text_votes import received_and_given
from epd_pruning.errors import PruningError
from epd_pruning.layer_base import LayerBatch, LayerPruner
from epd_pruning.schedule import Schedule

__all__ = ["AdaptInfer"]


@dataclass(frozen=True)
class AdaptInfer(LayerPruner):
    """s_v = Σ_h Σ_j w^h_j·A^h[j, v], w^h the column sums of the symmetrised text-to-text map.

    `blend` λ mixes that prior with its mean over text and heads; 0 is the plain sum over text.
    `prior_window` lets only the last so many text tokens vote (0: all of them, as published).
    """

    name: ClassVar[str] = "adaptinfer"
    presets: ClassVar[Mapping[str, Schedule]] = {
        "llava-1.5-7b/128": Schedule((1, 10, 20), (290, 72, 18)),
        "llava-1.5-7b/64": Schedule((1, 10, 20), (133, 27, 3)),
        "llava-1.5-7b/48": Schedule((1, 10, 20), (80, 24, 2)),
        "llava-1.5-7b/32": Schedule((1, 10, 20), (40, 12, 0)),
        "llava-1.5-13b/128": Schedule((1, 10, 20), (300, 94, 30)),
        "llava-1.5-13b/64": Schedule((1, 10, 20), (148, 40, 5)),
        "qwen2-vl-2b/10%": Schedule((0, 9, 19), ratios=(0.17, 0.6, 0.3), floor=1),
        "qwen2-vl-2b/30%": Schedule((0, 9, 19), ratios=(0.5, 0.6, 0.3), floor=1),
        "qwen2-vl-2b/50%": Schedule((0, 9, 19), ratios=(0.7, 0.9, 0.3), floor=1),
    }

    blend: float = 1.0
    prior_window: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.blend <= 1.0:
            raise PruningError("blend", "in [0, 1]", self.blend)
        if self.prior_window < 0:
            raise PruningError("prior_window", "at least 0", self.prior_window)

    def num_voters(self, num_text: int) -> int:
        return min(num_text, self.prior_window or num_text)

    def weigh(self, batch: LayerBatch, lse: Tensor) -> Tensor:
        prior = received_and_given(batch.queries, batch.keys, lse, batch.spans, scale=batch.scale)
        if self.blend < 1:
            for span in batch.spans.spans:
                own = prior[:, span.query : span.query + span.votes]
                own.lerp_(own.mean(), 1 - self.blend)
        return prior

    def macs(self, *, num_text: int, num_vision: int, num_heads: int, head_dim: int) -> int:
        voting = self.num_voters(num_text)
        return num_heads * head_dim * voting * (voting + num_vision)
