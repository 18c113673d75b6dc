"""Per-channel factors that are merged into weights before rounding.

Multiplying columns of a matrix by f and dividing its input by f changes nothing until either is
rounded. Three published ways to choose f, each a family that a search goes through:

    awq    (arXiv 2306.00978)   f = mean|x| ^ alpha, alpha in 0..1
    qqq    (arXiv 2406.09904)   f = max(1, max|x| / t), for a threshold t below the largest input
    fireq  (arXiv 2505.20839)   f = mean|w| ^ -gamma, gamma in 0..1; theirs is gamma = 1

Each family begins with f = 1, so a search never chooses what measures worse than doing nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["Choice", "candidates", "search"]

_SMALLEST_THRESHOLD = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """`factors [K]` made with `parameter` of its family, and the error `before` and with them."""

    factors: torch.Tensor
    parameter: float
    before: float
    after: float


def candidates(
    family: str, x: torch.Tensor, weight: torch.Tensor, steps: int
) -> Iterator[tuple[float, torch.Tensor]]:
    """Parameters and factors `[K]` of `family`, from inputs `x [T, K]` and `weight [N, K]`."""
    if family == "awq":
        yield from _powers(x.abs().mean(0), steps)
    elif family == "fireq":
        yield from _powers(1 / _floored(weight.abs().mean(0)), steps)
    else:
        yield from _thresholds(x.abs().amax(0), steps)


def _powers(base: torch.Tensor, steps: int) -> Iterator[tuple[float, torch.Tensor]]:
    """`base` to powers 0 to 1, scaled so that the extremes lie around 1."""
    for step in range(steps + 1):
        factors = _floored(base).pow(step / steps)
        yield step / steps, factors / (factors.max() * factors.min()).sqrt()


def _thresholds(largest: torch.Tensor, steps: int) -> Iterator[tuple[float, torch.Tensor]]:
    """Thresholds in equal ratios from the largest input down to a fiftieth of it."""
    top = float(_floored(largest).max())
    for step in range(steps):
        threshold = top * _SMALLEST_THRESHOLD ** (step / (steps - 1))
        yield threshold, (largest / threshold).clamp(min=1.0)


def _floored(values: torch.Tensor) -> torch.Tensor:
    """Never so small, beside the mean, that a quotient runs away."""
    return values.clamp(min=max(1e-4 * float(values.mean()), 1e-12))


def search(
    family: Iterator[tuple[float, torch.Tensor]],
    tie: Callable[[torch.Tensor], torch.Tensor],
    error: Callable[[torch.Tensor], float],
) -> Choice:
    """The factors of least `error`; `tie` makes a candidate one that can be merged."""
    tried = ((parameter, tie(factors)) for parameter, factors in family)
    measured = [(error(factors), parameter, factors) for parameter, factors in tried]
    least = min(measured, key=lambda item: item[0])
    return Choice(least[2], least[1], before=measured[0][0], after=least[0])
