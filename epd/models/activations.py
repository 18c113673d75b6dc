"""What lies between two linear layers: activations as a tensor, or in the eight bits that the next
layer takes, where the op before it can leave them so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from epd_kernels import (
    Fp8Linear,
    QuantLinear,
    add_rms_norm,
    add_rms_norm_quant,
    rms_norm,
    silu_mul,
    silu_mul_quant,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Activations", "gated", "linear", "normed", "token_count"]


@dataclass(frozen=True, slots=True)
class Activations:
    """Codes `[T, K]` with one scale per token `[T]`; `dtype` is what they were and will be."""

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


def _wanted(layer: nn.Module) -> torch.dtype | None:
    """The eight-bit dtype that `layer` takes, None where it takes floats."""
    return layer.activation_dtype if isinstance(layer, (QuantLinear, Fp8Linear)) else None


def token_count(x: torch.Tensor | Activations) -> int:
    """T of `x`."""
    return len(x.codes) if isinstance(x, Activations) else len(x)


def linear(layer: nn.Module, x: torch.Tensor | Activations) -> torch.Tensor:
    """`layer` applied to `x`: `[T, N]`."""
    if not isinstance(x, Activations):
        return layer(x)  # type: ignore[no-any-return]
    assert isinstance(layer, (QuantLinear, Fp8Linear))
    return layer.multiply(x.codes, x.scales, dtype=x.dtype)


def normed(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *,
    reader: nn.Module,
) -> tuple[torch.Tensor | Activations, torch.Tensor]:  # fmt: skip
    """The RMSNorm of `x + residual` as the linear layer `reader` takes it, and the sum."""
    if wanted := _wanted(reader):
        codes, scales, total = add_rms_norm_quant(x, residual, weight, eps, dtype=wanted)
        return Activations(codes, scales, x.dtype), total
    if residual is None:
        return rms_norm(x, weight, eps), x
    return add_rms_norm(x, residual, weight, eps)


def gated(gate_up: torch.Tensor, *, reader: nn.Module) -> torch.Tensor | Activations:
    """The SwiGLU product of `gate_up [T, 2I]` as the linear layer `reader` takes it."""
    if wanted := _wanted(reader):
        return Activations(*silu_mul_quant(gate_up, dtype=wanted), gate_up.dtype)
    return silu_mul(gate_up)
