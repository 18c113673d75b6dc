"""Rounding a weight matrix: grids of scales, to nearest, and with Hessian compensation.

GPTQ (arXiv 2210.17323): with inputs x and H = sum x x^T, the error of rounding one column is
spread over the columns not yet rounded, weighted by the rows of the Cholesky factor of H^-1, which
minimises ||(W - Q) x||. Columns go in descending order of diag H; scales are fixed before, so the
order leaves no trace in the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from epd.models.files import problem
from epd_kernels import QuantWeight

__all__ = ["Grid", "compensated", "fit_grid", "output_error", "per_tensor_scale", "round_scales"]

_BLOCK = 128
_SHRINKS = 20
_LARGEST = 448.0


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Scales (and, when asymmetric, whole zeros) fp32 `[N, K / g]`; codes are -7..7 or -8..7."""

    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def encode(self, weight: torch.Tensor) -> QuantWeight:
        """`weight [N, K]` to the nearest code of each group."""
        grouped = weight.view(*self.scales.shape, -1)
        zeros = None if self.zeros is None else self.zeros[..., None]
        codes = _round(grouped, self.scales[..., None], zeros)
        return QuantWeight(codes.to(torch.int8).flatten(1), self.scales, self.zeros)


def _round(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    if zeros is None:
        return (weight / scales).round().clamp(-7, 7)
    return ((weight / scales).round() + zeros).clamp(-8, 7)


def fit_grid(
    weight: torch.Tensor,
    group_size: int,
    *,
    symmetric: bool,
    importance: torch.Tensor | None = None,
) -> Grid:
    """The grid of `weight [N, K]`: each group's whole range, or, given `importance [K]`, the part.

    With `importance` (the mean square of each input) the range is shrunk in steps down to half
    where clipping its ends costs less than rounding the rest more finely saves.
    """
    grouped = weight.view(len(weight), weight.shape[1] // group_size, group_size)
    best = _grid(grouped, 1.0, symmetric)
    if importance is None:
        return best
    weights = importance.view(-1, group_size)
    least = _grid_error(grouped, best, weights)
    for step in range(1, _SHRINKS):
        candidate = _grid(grouped, 1 - 0.5 * step / _SHRINKS, symmetric)
        error = _grid_error(grouped, candidate, weights)
        better = error < least
        least = torch.where(better, error, least)
        zeros = None
        if best.zeros is not None and candidate.zeros is not None:
            zeros = torch.where(better, candidate.zeros, best.zeros)
        best = Grid(torch.where(better, candidate.scales, best.scales), zeros)
    return best


def _grid(grouped: torch.Tensor, share: float, symmetric: bool) -> Grid:
    if symmetric:
        return Grid(_nonzero(grouped.abs().amax(-1) * (share / 7)))
    low, high = grouped.amin(-1).clamp(max=0) * share, grouped.amax(-1).clamp(min=0) * share
    scales = _nonzero((high - low) / 15)
    return Grid(scales, (-low / scales).round() - 8)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _grid_error(grouped: torch.Tensor, grid: Grid, weights: torch.Tensor) -> torch.Tensor:
    scales, zeros = grid.scales[..., None], None if grid.zeros is None else grid.zeros[..., None]
    codes = _round(grouped, scales, zeros)
    rounded = (codes if zeros is None else codes - zeros) * scales
    return ((rounded - grouped).square() * weights).sum(-1)


def compensated(
    weight: torch.Tensor, gram: torch.Tensor, grid: Grid, *, damp: float = 0.01
) -> QuantWeight:
    """`weight [N, K]` in codes of `grid` by GPTQ, `gram [K, K]` being the sum of x x^T.

    `damp` times the mean of the diagonal is added to it; so weights of inputs that were always zero
    are rounded to nearest.
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    left = weight[:, order].clone()
    factor = _inverse_factor(gram[order][:, order], damp)
    group = order // (weight.shape[1] // grid.scales.shape[1])
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        errors = torch.empty(len(left), stop - start)
        for i in range(start, stop):
            scales = grid.scales[:, group[i]]
            zeros = None if grid.zeros is None else grid.zeros[:, group[i]]
            codes[:, i] = _round(left[:, i], scales, zeros)
            rounded = (codes[:, i] if zeros is None else codes[:, i] - zeros) * scales
            error = (left[:, i] - rounded) / factor[i, i]
            left[:, i + 1 : stop] -= error[:, None] * factor[i, i + 1 : stop]
            errors[:, i - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    restored = torch.empty_like(codes, dtype=torch.int8)
    restored[:, order] = codes.to(torch.int8)
    return QuantWeight(restored, grid.scales, grid.zeros)


def _inverse_factor(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of `gram`, damped until it is positive definite."""
    wide = gram.double()
    mean = wide.diagonal().mean()
    for attempt in range(4):
        damped = wide + torch.eye(len(wide), dtype=wide.dtype) * mean * damp * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        factor: torch.Tensor
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return factor.float()
    raise problem("Cannot compensate rounding errors.",
                  "The inputs of a layer have no usable second moments.",
                  "Calibrate on more or other samples.")  # fmt: skip


def output_error(weight: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> float:
    """||(W - Q) X|| / ||W X|| (Frobenius) from `gram`, the sum of x x^T."""
    difference = weight - rounded
    wrong, whole = ((m @ gram * m).sum().clamp(min=0) for m in (difference, weight))
    return float((wrong / whole.clamp(min=1e-30)).sqrt())


def per_tensor_scale(scales: torch.Tensor) -> float:
    """The power of two t, of 1 to 2^14, at which `scales * t` loses least when rounded to e4m3.

    FireQ (arXiv 2505.20839) stores group scales in e4m3 and multiplies the tensor by t so that they
    do not underflow, as long as no weight passes 448. It counts what falls below the smallest
    subnormal; the rounding error counted here includes that.
    """
    candidates = [2.0**power for power in range(15)]
    fitting = [t for t in candidates if float(scales.max()) * 7 * t <= _LARGEST] or [1.0]
    return min(fitting, key=lambda t: float((round_scales(scales, t) - scales).square().sum()))


def round_scales(scales: torch.Tensor, t: float) -> torch.Tensor:
    """`scales` as e4m3 holds them after a multiplication by `t`; never below its least number."""
    stored = (scales * t).clamp(2.0**-9, _LARGEST).to(torch.float8_e4m3fn)
    return stored.float() / t
