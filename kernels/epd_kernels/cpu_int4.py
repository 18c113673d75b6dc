"""Four-bit products of a few tokens on a CPU, by torch's own packed kernel.

It is taken where it is the fastest that torch has (`bench/bench_cpu_linear.py`): in bf16, for at
most eight tokens, on a CPU with AVX-512. In fp32 torch has no vector code for it. Scales and zeros
are rounded to bf16, as the products over a dequantised bf16 weight round the weight itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .packing import PackedWeight, QuantWeight

__all__ = ["CpuInt4", "suits_cpu_int4"]

_TOKENS = 8
_GROUP_SIZES = (32, 64, 128)
_ROWS = 16


def suits_cpu_int4(weight: PackedWeight, tokens: int, dtype: torch.dtype) -> bool:
    """Whether `CpuInt4` takes a product of so many tokens, given in `dtype`, and is the fastest."""
    few = dtype == torch.bfloat16 and 0 < tokens <= _TOKENS
    held = weight.out_features % _ROWS == 0 and weight.group_size in _GROUP_SIZES
    return few and held and torch.backends.cpu.get_cpu_capability() == "AVX512"


class CpuInt4:
    """x W^T of bf16 rows; W is kept in torch's packing, half a byte per weight and its scales."""

    def __init__(self, weight: QuantWeight) -> None:
        self._data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int() + 8, 1)
        zeros = torch.zeros_like(weight.scales)
        if weight.zeros is not None:
            zeros = -weight.zeros * weight.scales  # torch adds what the code 8 of 0..15 stands for
        pairs = torch.stack((weight.scales.t(), zeros.t()), dim=-1)
        self._scales = pairs.bfloat16().contiguous()
        self._group_size = weight.group_size

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """bf16 `[T, N]` of `x [T, K]`, which bf16 must hold: floats, or eight-bit codes."""
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self._data, self._group_size, self._scales
        )
        return out
