"""A linear layer over packed four-bit weights: the only face of the formats the engine sees."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from .activations import quantize_fp8, quantize_int8
from .cpu_int4 import CpuInt4, suits_cpu_int4
from .launch import device_facts
from .packing import Format, QuantWeight, pack
from .w4_dequant import fp8_row_scales, w4a8_fp8_large
from .w4_folded import FoldedScales, fold_scales, folds, w4a8_fp8_folded
from .w4_gemm import w4_gemm
from .w4_widen import w4a16_large

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["QuantLinear", "Scheme"]


class Scheme(Enum):
    """Bits of weights and activations."""

    W4A16 = "w4a16"
    W4A8_FP8 = "w4a8-fp8"
    W4A8_INT8 = "w4a8-int8"


# from so many tokens on, widening the weight to FP8 first is faster (measured on an H200)
_WIDENED_FROM = 512
# but between so many tokens folding scales into the FP8 operand is, from so many outputs in all on:
# fewer would not fill the device with wide tiles, and widening needs no tiles of ours
_FOLDED_BEYOND, _FOLDED_UP_TO = 64, 640
_FOLDED_OUTPUTS, _FOLDED_NOT_WIDENED = 1 << 21, 1 << 22
_EIGHT_BIT = {Scheme.W4A8_FP8: torch.float8_e4m3fn, Scheme.W4A8_INT8: torch.int8}
_QUANTIZE = {Scheme.W4A8_FP8: quantize_fp8, Scheme.W4A8_INT8: quantize_int8}


def _format(weight: QuantWeight, scheme: Scheme) -> Format:
    """SM7 costs the FP8 kernel least; zeros, and the code -8, need U4."""
    if scheme is Scheme.W4A8_INT8:
        return Format.HI4
    if scheme is Scheme.W4A16 or weight.zeros is not None or bool((weight.codes == -8).any()):
        return Format.U4
    return Format.SM7


class QuantLinear(nn.Module):
    """y = x W^T + bias with W in four bits; activations are quantised per token as `scheme` says.

    On a GPU this is one packed GEMM over a weight in tiles; from 2^21 outputs on W4A8-FP8 folds
    group scales into the weight as it is decoded, where groups have 128 inputs and no zeros. From
    512 tokens on (641 where folding has 2^22 outputs to fill the device with) the weight is
    widened instead, to FP8 or for W4A16 to 16 bits, for the length of the call (N * K elements),
    and the vendor multiplies; W4A8-INT8 stays with the packed GEMM.
    On a CPU the weight is unpacked at first use and kept: as int8 codes for W4A8-INT8 with one
    group per row, where torch's integer product is exact and (measured with AMX, 2048 x 1024) 2 to
    7 times as fast as fp32, and otherwise dequantised, since unpacking at every call costs several
    times the product. A few bf16 tokens take torch's four-bit product (`CpuInt4`) instead.
    """

    bias: torch.Tensor | None

    def __init__(
        self, weight: QuantWeight, scheme: Scheme, *, bias: torch.Tensor | None = None
    ) -> None:
        """Raises `FormatError` where the scheme cannot hold the weight (INT8 takes no zeros)."""
        super().__init__()
        self.scheme = scheme
        packed = pack(weight, _format(weight, scheme))
        self.weight = packed if packed.format is Format.U4 else packed.tiled()
        self.in_features = self.weight.in_features
        self.out_features = self.weight.out_features
        self.register_buffer("bias", bias, persistent=False)
        self._dense: dict[torch.dtype, torch.Tensor] = {}
        self._few: CpuInt4 | None = None
        self._row_scales: torch.Tensor | None = None
        self._folded: FoldedScales | None = None
        self._prepare()

    def _prepare(self) -> None:
        """On a GPU, make what larger batches need of the scales now, and not inside a graph."""
        self._row_scales = self._folded = None
        if self.scheme is Scheme.W4A8_FP8 and self.weight.data.is_cuda:
            self._row_scales = fp8_row_scales(self.weight)
            if folds(self.weight):
                self._folded = fold_scales(self.weight, self._row_scales)

    @property
    def activation_dtype(self) -> torch.dtype | None:
        """The eight-bit dtype `multiply` takes, None where activations keep their own."""
        return _EIGHT_BIT.get(self.scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., out_features]` in the dtype of `x [..., in_features]`."""
        rows, scales = x.reshape(-1, self.in_features), None
        if quantize := _QUANTIZE.get(self.scheme):
            rows, scales = quantize(rows)
        return self.multiply(rows, scales, dtype=x.dtype).view(*x.shape[:-1], self.out_features)

    def multiply(
        self, codes: torch.Tensor, scales: torch.Tensor | None, *, dtype: torch.dtype,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`[T, out_features]` in `dtype` of activations that are quantised already.

        `codes [T, in_features]` are of `activation_dtype` with `scales [T]`, as left by
        `add_rms_norm_quant` and `silu_mul_quant`, or floats without scales. `residual`
        `[T, out_features]` of `dtype` is added after the rounding, where it can be in the same
        kernel.
        """
        if not codes.is_cuda:
            out = self._on_cpu(codes, scales, dtype)
        elif self._folded is not None and scales is not None and self._is_folded(len(codes)):
            return w4a8_fp8_folded(
                codes, self.weight, out_dtype=dtype, x_scales=scales, bias=self.bias,
                residual=residual, folded=self._folded,
            )  # fmt: skip
        elif self._is_widened(codes):
            out = self._widened(codes, scales, dtype)
        else:
            return w4_gemm(
                codes, self.weight, out_dtype=dtype, x_scales=scales, bias=self.bias,
                residual=residual,
            )  # fmt: skip
        return out if residual is None else out + residual

    def _on_cpu(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        if suits_cpu_int4(self.weight, len(codes), dtype):
            self._few = self._few or CpuInt4(self.weight.unpack())
            out = self._few(codes).float()
        elif scales is None:
            return functional.linear(codes, self._kept(codes.dtype), self.bias).to(dtype)
        elif codes.dtype == torch.int8 and self.weight.group_size == self.in_features:
            out = torch._int_mm(codes, self._kept(torch.int8).t()) * self.weight.scales
        else:
            out = codes.float() @ self._kept(torch.float32).t()
        out = out if scales is None else out * scales[:, None]
        return (out if self.bias is None else out + self.bias.float()).to(dtype)

    def _is_folded(self, tokens: int) -> bool:
        """Whether folding is the faster way to multiply so many tokens."""
        outputs = tokens * self.out_features
        if tokens >= _WIDENED_FROM:
            return tokens <= _FOLDED_UP_TO and outputs >= _FOLDED_NOT_WIDENED
        return tokens > _FOLDED_BEYOND and outputs >= _FOLDED_OUTPUTS

    def _is_widened(self, codes: torch.Tensor) -> bool:
        """Whether the vendor's product over a widened weight is the faster one, and takes it."""
        if len(codes) < _WIDENED_FROM or device_facts(codes.device).arch < 90:
            return False
        if codes.dtype == torch.float8_e4m3fn:
            return self.out_features % 16 == 0
        return codes.dtype in (torch.float16, torch.bfloat16)

    def _widened(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        if scales is None:
            return w4a16_large(codes, self.weight, bias=self.bias).to(dtype)
        return w4a8_fp8_large(
            codes, self.weight, out_dtype=dtype, x_scales=scales, bias=self.bias,
            row_scales=self._row_scales,
        )  # fmt: skip

    def _kept(self, dtype: torch.dtype) -> torch.Tensor:
        """The unpacked weight: dequantised, or its codes for int8."""
        if dtype not in self._dense:
            weight = self.weight.unpack()
            codes = weight.codes if dtype == torch.int8 else weight.dequantize()
            self._dense[dtype] = codes.to(dtype)
        return self._dense[dtype]

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> QuantLinear:
        """Packed tensors follow the module's device but never its dtype."""
        self.weight = self.weight.to(fn(self.weight.data).device)
        self._dense.clear()
        self._few = None
        self._prepare()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self

    def resident_bytes(self) -> int:
        """Bytes of packed codes, scales, zeros and bias; not what a CPU keeps unpacked."""
        held = [self.weight.data, self.weight.scales, self.weight.zeros, self.bias]
        if self._folded is not None:
            held.append(self._folded.tables)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, scheme={self.scheme.value}, group_size={self.weight.group_size}"
