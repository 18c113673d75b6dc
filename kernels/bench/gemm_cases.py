"""Operands, schemes and references that the GEMM benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timing import copies_beyond_l2, relative_error

from epd_kernels import Format, PackedWeight, pack, quantize_fp8, quantize_int8, quantize_weight
from epd_kernels.w4_dequant import dequantize_fp8
from epd_kernels.w4_folded import FoldedScales, fold_scales, w4a8_fp8_folded_ref
from epd_kernels.w4_folded import w4a8_fp8_folded_triton as folded_triton
from epd_kernels.w4_gemm import w4_gemm_ref, w4_gemm_triton

if TYPE_CHECKING:
    from epd_kernels.launch import GemmConfig

__all__ = ["SCHEMES", "SHAPES", "TOKENS", "TOLERANCE", "Case", "Scheme", "activations",
           "checked", "shape_of", "weight_of"]  # fmt: skip

TOKENS = (1, 4, 16, 64, 128, 256, 640, 2048, 8192)
# the last is QQQ's own
SHAPES = (
    (22016, 4096), (28672, 4096), (12288, 4096), (4096, 11008), (8192, 21760), (4096, 4096),
    (6144, 4096),
)  # fmt: skip
TOLERANCE = 8e-3


@dataclass(frozen=True)
class Scheme:
    """A format, the group size (0: one per row), and how activations reach it."""

    name: str
    format: Format
    group: int
    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None
    kind: str
    tiled: bool = False
    folded: bool = False


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w4a8-fp8", Format.SM7, 128, quantize_fp8, "fp8"),
        Scheme("w4a8-fp8-tiled", Format.SM7, 128, quantize_fp8, "fp8", tiled=True),
        Scheme("w4a8-fp8-folded-tiled", Format.SM7, 128, quantize_fp8, "fp8", True, True),
        Scheme("w4a8-int8-channel", Format.HI4, 0, quantize_int8, "int8"),
        Scheme("w4a8-int8-channel-tiled", Format.HI4, 0, quantize_int8, "int8", tiled=True),
        Scheme("w4a8-int8-group", Format.HI4, 128, quantize_int8, "int8"),
        Scheme("w4a8-int8-group-tiled", Format.HI4, 128, quantize_int8, "int8", tiled=True),
        Scheme("w4a16", Format.U4, 128, None, "bf16"),
    )
}


def shape_of(text: str) -> tuple[int, int]:
    """(N, K) as written on a command line, "22016x4096"."""
    n, k = map(int, text.split("x"))
    return n, k


def weight_of(n: int, k: int, device: str = "cuda") -> torch.Tensor:
    """A Gaussian bf16 weight `[n, k]`, the same for every scheme."""
    rng = torch.Generator(device).manual_seed(n + k)
    return torch.randn(n, k, generator=rng, device=device, dtype=torch.bfloat16)


def activations(m: int, k: int, device: str = "cuda") -> torch.Tensor:
    """Gaussian bf16 tokens `[m, k]`."""
    rng = torch.Generator(device).manual_seed(m)
    return torch.randn(m, k, generator=rng, device=device, dtype=torch.bfloat16)


class Case:
    """One scheme at one weight shape: packed copies beyond the L2 cache, and what they should give.

    `dense` is the fp32 weight that the packed one stands for, after the second rounding where
    scales are folded. `copies` 0: as many as it takes.
    """

    def __init__(self, scheme: Scheme, weight: torch.Tensor, *, copies: int = 0) -> None:
        canonical = quantize_weight(weight, group_size=scheme.group or weight.shape[1])
        self.scheme = scheme
        self.shape = tuple(weight.shape)
        packed = pack(canonical, scheme.format)
        self.packed = packed.tiled() if scheme.tiled else packed
        self.dense = canonical.dequantize()
        if scheme.folded:
            codes, rows = dequantize_fp8(self.packed)
            self.dense = codes.float() * rows[:, None]
        self.weight_bytes = sum(
            t.nbytes for t in (packed.data, packed.scales, packed.zeros) if t is not None
        )
        copies = copies or (copies_beyond_l2(self.weight_bytes) if weight.is_cuda else 1)
        self.copies = [self.packed, *(self._copy() for _ in range(copies - 1))]
        self._folded: list[FoldedScales] = []
        if scheme.folded:
            self._folded = [fold_scales(each) for each in self.copies]

    def _copy(self) -> PackedWeight:
        return replace(
            self.packed, data=self.packed.data.clone(), scales=self.packed.scales.clone()
        )

    def quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the kernel is given of `x`."""
        return self.scheme.quantize(x) if self.scheme.quantize else (x, None)

    def expected(self, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """The fp32 product of the operands as they are, rounding of neither counted."""
        wide = codes.float() if scales is None else codes.float() * scales[:, None]
        return wide @ self.dense.t()

    def calls(
        self, codes: torch.Tensor, scales: torch.Tensor | None, config: GemmConfig | None
    ) -> list[Callable[[], torch.Tensor]]:
        """One call of the GEMM per copy of the weight; on a CPU, of its reference."""
        options: dict[str, Any] = {"out_dtype": torch.bfloat16, "x_scales": scales}
        if codes.is_cuda:
            options["config"] = config
        if self._folded:
            run = folded_triton if codes.is_cuda else w4a8_fp8_folded_ref
            return [
                partial(run, codes, packed, folded=folded, **options)
                for packed, folded in zip(self.copies, self._folded, strict=True)
            ]
        run = w4_gemm_triton if codes.is_cuda else w4_gemm_ref
        return [partial(run, codes, packed, **options) for packed in self.copies]

    def num_bytes(self, codes: torch.Tensor) -> int:
        """Each operand once: weight, scales, activations, and the bf16 output."""
        return self.weight_bytes + codes.nbytes + 2 * len(codes) * self.shape[0]


def checked(call: Callable[[], torch.Tensor], expected: torch.Tensor, what: str) -> float:
    """The relative error of a call; raises `ArithmeticError` beyond the tolerance, NaN included."""
    error = relative_error(call(), expected)
    if not error <= TOLERANCE:
        raise ArithmeticError(f"{what} is wrong: relative error {error:.1e}")
    return error
