"""A linear layer over FP8 weights with one scale per row, and activations quantised per token.

y[m, n] = s_x[m] * s_w[n] * sum_k x8[m, k] w8[n, k] + bias[n]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .activations import quantize_fp8
from .errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Fp8Linear", "Fp8Weight", "quantize_weight_fp8"]


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """`codes` e4m3 `[N, K]` and `scales` fp32 `[N]`: w[n, k] = codes[n, k] * scales[n]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.float8_e4m3fn or self.codes.ndim != 2:
            raise FormatError(f"codes must be e4m3 [N, K], found {self.codes.dtype}")
        if self.scales.shape != (self.codes.shape[0],):
            raise FormatError(
                f"one scale per row wanted, found {tuple(self.scales.shape)} "
                f"for {self.codes.shape[0]} rows"
            )
        if not bool(self.scales.isfinite().all()):
            raise FormatError("scales must be finite")
        if bool(((self.codes.view(torch.uint8) & 127) == 127).any()):
            raise FormatError("codes hold NaN")

    def dequantize(self) -> torch.Tensor:
        """`w` fp32 `[N, K]`, straight from the definition."""
        return self.codes.float() * self.scales[:, None]


def quantize_weight_fp8(weight: torch.Tensor) -> Fp8Weight:
    """`weight [N, K]` rounded to e4m3 with scale absmax / 448 per row."""
    codes, scales = quantize_fp8(weight.contiguous())
    return Fp8Weight(codes, scales)


class Fp8Linear(nn.Module):
    """y = x W^T + bias with W and, per token, x in e4m3.

    On a GPU this is the vendor's FP8 product, rounded to bf16. On a CPU the weight is widened once
    and kept.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: Fp8Weight, *, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.codes.shape
        self.register_buffer("bias", bias, persistent=False)
        self._wide: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., out_features]` in the dtype of `x [..., in_features]`.

        Raises `FormatError` on a GPU where the vendor's product does not take the shape.
        """
        codes, scales = quantize_fp8(x.reshape(-1, self.in_features))
        out = self.multiply(codes, scales, dtype=x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype of the codes that `multiply` takes."""
        return torch.float8_e4m3fn

    def multiply(
        self, codes: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype
    ) -> torch.Tensor:
        """`[T, out_features]` in `dtype` of e4m3 `codes [T, in_features]` with `scales [T]`.

        Raises `FormatError` as `forward` does.
        """
        out = self._product(codes, scales)
        return (out if self.bias is None else out + self.bias.to(out.dtype)).to(dtype)

    def _product(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        if not codes.is_cuda:
            if self._wide is None:
                self._wide = self.weight.codes.float().t()
            return codes.float() @ self._wide * scales[:, None] * self.weight.scales
        if self.in_features % 16 or self.out_features % 16:
            raise FormatError(
                f"the FP8 product needs N % 16 == 0 and K % 16 == 0, found N = "
                f"{self.out_features}, K = {self.in_features}"
            )
        return torch._scaled_mm(
            codes, self.weight.codes.t(), scales[:, None], self.weight.scales[None],
            None, None, torch.bfloat16,
        )  # fmt: skip

    def resident_bytes(self) -> int:
        """Bytes of codes, scales and bias."""
        weight = self.weight
        held = [weight.codes, weight.scales, *([] if self.bias is None else [self.bias])]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp8Linear:
        """The weight follows the module's device but never its dtype."""
        device = fn(self.weight.scales).device
        self.weight = Fp8Weight(self.weight.codes.to(device), self.weight.scales.to(device))
        self._wide = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme=fp8"
