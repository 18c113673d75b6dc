"""Rows of activations that a program holds in registers, and codes with one scale per row.

A row is a tuple of chunks, so that a width which is no power of two wastes little; all chunks are
loaded before the first is used. All its numbers are divided by one scale, which would take longer
than all else: done by the reciprocal y = round(1 / scale), q = round(x y) is off by less than two
units in the last place, a step q - y (q scale - x) brings it within one, and from there a second
step rounds it correctly (Markstein, 1990: y is correctly rounded, q scale - x fused and exact).
Numbers of at most 11 digits, as 16-bit ones are, are right after one step: all of them were tried,
over every scale. Written with q scale - x, steps keep the sign of a zero.

Where fp32 cannot be cast to e4m3 (Triton's interpreter drops the carry and does not saturate) it
is encoded by integer arithmetic instead. For |x| >= 2^-6 the exponent is rebased by 120 and 20
mantissa bits are rounded away; below, adding 1.5 * 2^23 to 512 |x| leaves the rounded subnormal in
the low bits of the sum.
"""

from __future__ import annotations

from typing import Any

import torch

from .launch import INTERPRETED, constant, device_facts, jit, next_power_of_2, tl

__all__ = [
    "EightBitTarget",
    "e4m3_bits",
    "load_row",
    "no_chunks",
    "quantize_row",
]

_FLOOR = 1e-12
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
_REFINED = constant(not INTERPRETED)  # the interpreter has no fused product and sum
_FEW_ROWS = 8  # an FFN gains 3 % at 1 and 2 % at 4 tokens, and loses 5 % at 16 (on an H200)
_PER_THREAD = 8  # numbers of a chunk: 16 bytes of a 16-bit row


@jit
def no_chunks() -> tl.tensor:
    """A row to add chunks to."""
    return ()


@jit
def load_row(p_row: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """The row of width K at `p_row`, 0 past its end."""
    b_x = no_chunks()
    for c in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        o_k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        b_x += (tl.load(p_row + o_k, mask=o_k < K, other=0.0),)
    return b_x


@jit
def e4m3_bits(b_x: tl.tensor) -> tl.tensor:
    """The byte of each fp32 in -448..448, by integer arithmetic."""
    sign = (b_x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    b_abs = tl.abs(b_x)
    bits = b_abs.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (b_abs * 512.0 + 12582912.0).to(tl.uint32, bitcast=True) & 15
    return (tl.where(b_abs >= 0.015625, normal, small) | sign).to(tl.uint8)


@jit
def _row_peak(b_x: tl.tensor, K: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """The largest magnitude of a row, fp32."""
    b_peak = tl.abs(b_x[0])
    for c in tl.static_range(1, (K + BLOCK_K - 1) // BLOCK_K):
        b_peak = tl.maximum(b_peak, tl.abs(b_x[c]))
    return tl.max(b_peak, axis=0).to(tl.float32)


@jit
def _quotients(b_x: tl.tensor, b_scale: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """fp32 numbers over one scale, correctly rounded unless tiny."""
    if not _REFINED:
        return tl.div_rn(b_x, b_scale + tl.zeros_like(b_x))
    b_inverse = tl.div_rn(1.0, b_scale) + tl.zeros_like(b_x)
    b_scale += tl.zeros_like(b_x)
    b_q = b_x * b_inverse
    for _ in tl.static_range(STEPS):
        b_q = tl.fma(tl.fma(b_q, b_scale, -b_x), -b_inverse, b_q)
    return b_q


@jit
def _store_codes(
    b_x: tl.tensor, b_scale: tl.tensor, p_codes: tl.tensor, mask: tl.tensor, LARGEST: tl.constexpr,
    ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """Store the codes of numbers over one scale; as bytes where they are encoded by hand."""
    STEPS: tl.constexpr = 2 if b_x.dtype.primitive_bitwidth > 16 else 1
    b_q = _quotients(b_x.to(tl.float32), b_scale, STEPS)
    if LARGEST == 448.0 and not ENCODE:
        b_code = b_q.to(p_codes.dtype.element_ty)  # saturates
    else:
        b_q = tl.minimum(tl.maximum(b_q, -LARGEST), LARGEST)
        # adding and taking away 1.5 * 2^23 rounds half to even
        b_code = e4m3_bits(b_q) if ENCODE else (b_q + 12582912.0 - 12582912.0).to(tl.int8)
    tl.store(p_codes, b_code, mask=mask)


@jit
def quantize_row(
    b_x: tl.tensor, codes: tl.tensor, scales: tl.tensor, i_m: tl.tensor, K: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr, ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """Store the codes and the scale of row `i_m`, whose chunks are 0 past its end."""
    b_scale = tl.maximum(tl.div_rn(_row_peak(b_x, K, BLOCK_K), LARGEST), FLOOR)
    tl.store(scales + i_m, b_scale)
    for c in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        o_k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        _store_codes(b_x[c], b_scale, codes + i_m * K + o_k, o_k < K, LARGEST, ENCODE)


class EightBitTarget:
    """The outputs of a kernel that ends in `quantize_row`, and the arguments they imply.

    With EARLY, on compute capability 9.0 and later, it waits by itself for the kernel ahead of it.
    With OPENS it also lets the one behind it in at once, to find its place while this one runs. Of
    many rows that place would be uneven, beside the multiprocessors which still hold a row.
    """

    def __init__(
        self, rows: int, width: int, dtype: torch.dtype, device: torch.device, *,
        chunk: int | None = None,
    ) -> None:  # fmt: skip
        """`chunk` numbers of a row are taken at once, eight by a thread."""
        encode = INTERPRETED and dtype == torch.float8_e4m3fn
        held = torch.uint8 if encode else dtype
        codes = torch.empty(rows, width, dtype=held, device=device)
        self.codes = codes.view(dtype)
        self.scales = torch.empty(rows, dtype=torch.float32, device=device)
        self.pointers = (codes, self.scales)
        power = next_power_of_2(width)
        chunk = min(power, chunk or max(2048, power // 8))
        early = device_facts(device).arch >= 90
        self.options: dict[str, Any] = {
            "K": width, "LARGEST": _LARGEST[dtype], "FLOOR": _FLOOR, "ENCODE": encode,
            "BLOCK_K": chunk, "num_warps": max(chunk // (32 * _PER_THREAD), 1),
            "EARLY": early, "OPENS": early and rows <= _FEW_ROWS,
            **({"launch_pdl": True} if early else {}),
        }  # fmt: skip
