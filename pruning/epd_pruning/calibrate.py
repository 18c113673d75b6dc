"""Where a decoder's attention to the image shifts, and a schedule that prunes there.

AdaptInfer's offline analysis, restated for any depth: for the vision tokens that text attends to
most, find the layer at which the running total of that attention bends; prune around the layers
where many tokens bend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from epd_pruning.errors import PruningError
from epd_pruning.schedule import Schedule, fit_average
from epd_pruning.selection import at_least_fp32, stable_top_k

__all__ = ["calibrated_schedule", "change_points", "propose_layers", "shift_histogram"]


def change_points(curves: Tensor) -> Tensor:
    """Start [V], in 1 … L − 1, of the second of two levels fitted to each of `curves` [V, L].

    The fit has the least squared error; the first of equal splits wins.
    """
    curves = curves.double()
    size = curves.shape[1]
    left, squares = curves.cumsum(1)[:, :-1], curves.square().sum(1, keepdim=True)
    right = curves.sum(1, keepdim=True) - left
    split = torch.arange(1, size, device=curves.device)
    # squared error of two segments: Σx² − (Σ left)²/n − (Σ right)²/(L − n)
    error = squares - left.square() / split - right.square() / (size - split)
    return error.argmin(1) + 1


def shift_histogram(samples: Iterable[Tensor], *, share: float = 0.1) -> Tensor:
    """Count [L] of vision tokens whose attention shifts after each layer, over all `samples`.

    A sample [L, V] is the attention of text to each vision token, summed over heads and text rows;
    the `share` of its tokens with most in all is looked at.
    """
    total: Tensor | None = None
    for sample in samples:
        sample = at_least_fp32(sample)
        chosen = stable_top_k(sample.sum(0), max(1, round(share * sample.shape[1])))
        shifts = change_points(sample[:, chosen].cumsum(0).mT) - 1
        counts = shifts.bincount(minlength=sample.shape[0])
        total = counts if total is None else total + counts
    if total is None:
        raise PruningError("samples", "at least one", 0)
    return total


def propose_layers(histogram: Sequence[int], stages: int, *, first: int = 0) -> tuple[int, ...]:
    """`stages` layers to prune after, in [`first`, L − 2]: ends and beginnings of dense regions.

    A region is a run of layers with more shifts than the mean. Heavier regions come first, each
    with its last layer, then the layer before it; what is missing halves the widest gaps.
    """
    size = len(histogram)
    if not 1 <= stages <= size - 1 - first:
        raise PruningError("stages", f"in [1, {size - 1 - first}]", stages)
    chosen: set[int] = set()
    for _, begin, end in sorted(_dense_regions(histogram)):
        for layer in (end, begin - 1):
            if first <= layer <= size - 2 and len(chosen) < stages:
                chosen.add(layer)
    while len(chosen) < stages:
        edges = [first - 1, *sorted(chosen), size - 1]
        gaps = [(low - high, low) for low, high in pairwise(edges)]
        width, low = min(gaps)
        chosen.add(low - width // 2)
    return tuple(sorted(chosen))


def _dense_regions(histogram: Sequence[int]) -> list[tuple[int, int, int]]:
    """(−mass, first layer, last layer) of every run above the mean."""
    mean = sum(histogram) / len(histogram)
    regions: list[tuple[int, int, int]] = []
    begin: int | None = None
    for layer, count in enumerate([*histogram, -1]):
        if count > mean:
            begin = layer if begin is None else begin
        elif begin is not None:
            regions.append((-sum(histogram[begin:layer]), begin, layer - 1))
            begin = None
    return regions


def calibrated_schedule(
    histogram: Sequence[int],
    *,
    num_tokens: int,
    average: float,
    shares: tuple[float, ...] = (133, 27, 3),
    first: int = 0,
) -> Schedule:
    """A schedule at the proposed layers that processes `average` of `num_tokens` per layer.

    One stage per entry of `shares`, the proportions of what is kept: the published ones by default,
    since the analysis says where to prune and not how much.
    """
    return fit_average(
        propose_layers(histogram, len(shares), first=first),
        shares,
        num_tokens=num_tokens,
        num_layers=len(histogram),
        average=average,
    )
