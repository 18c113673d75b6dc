"""One matrix in the codes of a scheme: rounded to nearest or compensated, and served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from epd.quantize.options import GROUP_SIZES
from epd.quantize.rounding import compensated, fit_grid, per_tensor_scale, round_scales
from epd_kernels import (
    Fp8Linear,
    Fp8Weight,
    QuantLinear,
    QuantWeight,
    Scheme,
    quantize_weight_fp8,
)

if TYPE_CHECKING:
    import torch

    from epd.quantize.options import QuantizeOptions

__all__ = ["Rounded", "as_linear", "round_compensated", "round_nearest"]

Rounded = QuantWeight | Fp8Weight


def round_nearest(weight: torch.Tensor, options: QuantizeOptions) -> Rounded:
    """`weight [N, K]` to the nearest codes, nothing done before."""
    if options.scheme == "fp8":
        return quantize_weight_fp8(weight)
    size = _group_size(weight.shape[1], options)
    return fit_grid(weight, size, symmetric=options.scheme != "w4a16").encode(weight)


def round_compensated(
    weight: torch.Tensor, gram: torch.Tensor, tokens: int, options: QuantizeOptions
) -> tuple[Rounded, float]:
    """`weight [N, K]` in codes that suit its inputs, and FireQ's scale of the tensor, else 1.

    `gram [K, K]` is the sum of x x^T over `tokens` inputs. FP8 is rounded to nearest all the same.
    """
    if options.scheme == "fp8":
        return quantize_weight_fp8(weight), 1.0
    size, symmetric = _group_size(weight.shape[1], options), options.scheme != "w4a16"
    grid = fit_grid(weight, size, symmetric=symmetric, importance=gram.diagonal() / tokens)
    t = 1.0
    if options.scheme == "fireq":
        t = per_tensor_scale(grid.scales)
        grid = type(grid)(round_scales(grid.scales, t))
    return compensated(weight, gram, grid), t


def as_linear(
    weight: Rounded, bias: torch.Tensor | None, options: QuantizeOptions
) -> QuantLinear | Fp8Linear:
    """The layer that will serve `weight`."""
    if isinstance(weight, Fp8Weight):
        return Fp8Linear(weight, bias=bias)
    return QuantLinear(weight, Scheme(options.stored_scheme), bias=bias)


def _group_size(width: int, options: QuantizeOptions) -> int:
    """The group size asked for where it divides `width`, else the largest that does, else all."""
    asked = options.group_size or width
    return next((s for s in (asked, *GROUP_SIZES) if s <= asked and width % s == 0), width)
