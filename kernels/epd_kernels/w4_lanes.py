"""The assembly of a four-bit GEMM by single warps: what 32 lanes hold of a tile, and do to it.

A lane has a row g = lane // 4 and a column t = lane % 4. The matrix instruction m16n8k32 takes 16
weight rows, g and g + 8 of them in this lane, by eight tokens, of which the lane holds token g's
inputs and the sums of tokens 2 t and 2 t + 1. Which input meets which index of the sum is free as
long as both operands agree: a lane takes bytes 16 t .. 16 t + 15 of its rows of a tile, four words
each, and of token g the 16 inputs that the low nibbles of those bytes carry and the 16 of the high
ones. So weights go from memory to the lane that multiplies them, in one load of 16 bytes per row,
and masked words of HI4 are operands as they are.
"""

from __future__ import annotations

__all__ = ["LOAD", "LOAD_IO", "LOAD_ONCE", "PRODUCT", "PRODUCT_IO"]

LOAD = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
LOAD_ONCE = "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];"
LOAD_IO = "=r,=r,=r,=r,l"

_MMA = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"


def _product() -> str:
    """Assembly that adds a tile of 16 rows by eight tokens to the four sums of a lane.

    In: four words of row g ($4..) and of row g + 8 ($8..); of token g, four words that meet the
    high halves of bytes ($12..) and four that meet the low ones ($16..); the sums before ($20..).
    """
    lines = [".reg .b32 a0, a1, b0, b1, s0, s1, s2, s3;"]
    lines += [f"mov.b32 s{i}, ${20 + i};" for i in range(4)]
    for w in range(4):
        for r in (0, 1):
            word = f"${4 + 4 * r + w}"
            lines += [f"and.b32 a{r}, {word}, 0xF0F0F0F0;", f"shl.b32 b{r}, {word}, 4;",
                      f"and.b32 b{r}, b{r}, 0xF0F0F0F0;"]  # fmt: skip
        sums = "{s0, s1, s2, s3}"
        lines.append(f"{_MMA} {sums}, {{a0, a1, b0, b1}}, {{${12 + w}, ${16 + w}}}, {sums};")
    lines += [f"mov.b32 ${i}, s{i};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


PRODUCT = _product()
PRODUCT_IO = ",".join(["=r"] * 4 + ["r"] * 20)
