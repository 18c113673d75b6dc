"""SparseVLM: a fixed jury of text tokens, and a second life for the best of the dropped.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", ICML 2025 (version 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from epd_pruning.errors import PruningError
from epd_pruning.layer_base import LayerBatch, LayerInputs, LayerPruner, LayerSelection
from epd_pruning.schedule import Schedule
from epd_pruning.selection import at_least_fp32, group_sums, stable_top_k

__all__ = ["SparseVLM", "density_peak_means", "num_recycled"]

# of the dropped, the share that is looked at again; of those, one mean for so many
RECYCLED_SHARE, PER_MEAN, NEIGHBOURS = 0.3, 10, 5


@dataclass(frozen=True)
class SparseVLM(LayerPruner):
    """Head-mean attention, averaged over the raters chosen at the embeddings.

    `recycling` appends density-peak means of the best 30 % of what each stage drops. The noise that
    breaks ties of density is drawn from `seed`.
    """

    name: ClassVar[str] = "sparsevlm"
    reads_hidden: ClassVar[bool] = True
    has_raters: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Schedule]] = {
        "llava-1.5-7b/192": Schedule((2, 6, 15), (300, 200, 110)),
        "llava-1.5-7b/128": Schedule((2, 6, 15), (303, 110, 36)),
        "llava-1.5-7b/64": Schedule((2, 6, 15), (66, 30, 17)),
    }

    recycling: bool = False
    seed: int = 0

    def choose_raters(self, vision: Tensor, text: Tensor) -> Tensor | None:
        logits = at_least_fp32(vision) @ at_least_fp32(text).mT
        share = logits.softmax(1).mean(0)
        chosen = share > share.mean()
        return chosen | ~chosen.any()

    def num_voters(self, num_text: int) -> int:
        return num_text

    def weigh(self, batch: LayerBatch, lse: Tensor) -> Tensor:
        if batch.raters is None:
            raise PruningError("raters", "given: choose_raters at the embeddings", None)
        return (batch.raters / lse.shape[0]).expand(lse.shape)

    def order(self, inputs: LayerInputs, num_kept: int) -> Tensor:
        # the rest of the order says which of the dropped are recycled
        return stable_top_k(self.score(inputs), inputs.vision.shape[0])

    def finish(self, inputs: LayerInputs, order: Tensor, num_kept: int) -> LayerSelection:
        kept = LayerPruner.finish(self, inputs, order, num_kept)
        if not self.recycling:
            return kept
        if inputs.hidden is None:
            raise PruningError("hidden", "given: recycling reads it", None)
        again, means = _recycling(order.shape[0] - num_kept)
        source = inputs.hidden[inputs.vision[order[num_kept : num_kept + again].sort().values]]
        generator = torch.Generator().manual_seed((self.seed << 32) ^ inputs.seed)
        noise = torch.rand(source.shape[0], generator=generator).to(source.device)
        recycled = density_peak_means(source, means, noise=1e-6 * noise)
        return LayerSelection(kept.vision, recycled.to(source.dtype))


def num_recycled(num_dropped: int) -> int:
    """Rows that recycling appends for `num_dropped` tokens."""
    return _recycling(num_dropped)[1]


def _recycling(num_dropped: int) -> tuple[int, int]:
    again = min(int(RECYCLED_SHARE * num_dropped) + 1, num_dropped)
    return again, min(again // PER_MEAN + 1, again)


def density_peak_means(rows: Tensor, count: int, *, noise: Tensor) -> Tensor:
    """Means [count, D] of clusters of `rows` [n, D] around its density peaks (DPC-KNN).

    Density is exp(−mean squared distance to the nearest neighbours) + `noise`; a peak is dense and
    far from anything denser; every row joins the peak nearest to it.
    """
    rows = at_least_fp32(rows)
    distance = torch.cdist(rows, rows) / rows.shape[1] ** 0.5
    nearest = distance.topk(min(NEIGHBOURS, rows.shape[0]), largest=False).values
    density = torch.exp(-nearest.square().mean(1)) + noise
    denser = density > density[:, None]
    isolation = torch.where(denser, distance, distance.max()).amin(1)
    peaks = stable_top_k(isolation * density, count)
    home = distance[:, peaks].argmin(1)
    home[peaks] = torch.arange(count, device=home.device)
    sums, sizes = group_sums(rows, home, count)
    return sums / sizes[:, None]
