"""The assembly of a four-bit GEMM by single warps: what 32 lanes hold of a tile, and do to it.

A lane has a row g = lane // 4 and a column t = lane % 4. The matrix instruction takes 16 weight
rows, g and g + 8 of them in this lane, by eight tokens, of which the lane holds token g's inputs
and the sums of tokens 2 t and 2 t + 1. Which input meets which index of the sum is free as long as
both operands agree: a lane takes bytes 16 t .. 16 t + 15 of its rows of a tile, four words each,
and of token g the 16 inputs that the low nibbles of those bytes carry and the 16 of the high ones.
So weights go from memory to the lane that multiplies them, in one load of 16 bytes per row.

HI4 against int8: masked words are operands as they are, low and high nibbles the two halves of 32
inputs. SM7 against e4m3, for which compute capability 9.0 has no instruction of single warps: both
are widened to fp16, exactly. In the upper byte of a halfword the sign and magnitude of a code are
the fp16 number code / 2^16, e4m3 has an instruction; the halfwords of a word pair its even bytes
and its odd ones.
"""

from __future__ import annotations

from functools import cache

__all__ = ["HALVES", "HALVES_IO", "LOAD", "LOAD_IO", "LOAD_ONCE", "fp8_product", "int8_product"]

LOAD = "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];"
LOAD_ONCE = "ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];"
LOAD_IO = "=r,=r,=r,=r,l"
# bytes 0 and 2 of a word of e4m3 as two fp16, then bytes 1 and 3
HALVES = """{
    .reg .b32 sorted;
    .reg .b16 even, odd;
    prmt.b32 sorted, $2, $2, 0x3120;
    mov.b32 {even, odd}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, even;
    cvt.rn.f16x2.e4m3x2 $1, odd;
}"""
HALVES_IO = "=r,=r,r"
_FP16 = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
_INT8 = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"


def _braced(names: list[str]) -> str:
    return "{" + ", ".join(names) + "}"


def _block(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def _product(kind: str, total: list[str], left: list[str], right: list[str]) -> str:
    return f"{kind} {_braced(total)}, {_braced(left)}, {_braced(right)}, {_braced(total)};"


def _operands(first: int, count: int) -> list[str]:
    return [f"${first + i}" for i in range(count)]


@cache
def fp8_product(groups: int) -> tuple[str, str]:
    """Assembly and constraints: sums over a tile of 16 rows by `groups` times eight tokens.

    Out: four sums per group, rows g and g + 8 by tokens 2 t and 2 t + 1. In: four words of row g
    and of row g + 8; per group the halves of four words of low nibbles' inputs, then high ones'.
    """
    outs = 4 * groups
    rows = [_operands(outs + 4 * r, 4) for r in (0, 1)]
    sums = [[f"s{j}{i}" for i in range(4)] for j in range(groups)]
    flat = [name for group in sums for name in group]
    parts = [f"{h}{e}{r}" for h in ("low", "high") for e in ("even", "odd") for r in (0, 1)]
    lines = [f".reg .b32 up, down, four, twelve, {', '.join(parts)};",
             f".reg .f32 {', '.join(flat)};"]  # fmt: skip
    lines += [f"mov.f32 {name}, 0f00000000;" for name in flat]
    for w in range(4):
        for r in (0, 1):
            lines += _widened(rows[r][w], r)
        for i, h in enumerate(("low", "high")):
            left = [f"{h}even0", f"{h}even1", f"{h}odd0", f"{h}odd1"]
            for j in range(groups):
                right = _operands(outs + 8 + 16 * j + 8 * i + 2 * w, 2)
                lines.append(_product(_FP16, sums[j], left, right))
    lines += [f"mov.f32 ${i}, {name};" for i, name in enumerate(flat)]
    return _block(lines), ",".join(["=f"] * outs + ["r"] * (8 + 16 * groups))


def _widened(word: str, r: int) -> list[str]:
    """Four registers of two fp16 each from a word of SM7: nibble by even or odd bytes."""
    return [
        f"shl.b32 up, {word}, 8;", f"and.b32 lowodd{r}, {word}, 0x87008700;",
        f"and.b32 loweven{r}, up, 0x87008700;", f"shr.u32 down, {word}, 4;",
        f"shl.b32 four, {word}, 4;", f"shl.b32 twelve, {word}, 12;",
        "and.b32 down, down, 0x07000700;", f"lop3.b32 highodd{r}, four, 0x80008000, down, 0xEA;",
        "and.b32 down, four, 0x07000700;",
        f"lop3.b32 higheven{r}, twelve, 0x80008000, down, 0xEA;",
    ]  # fmt: skip


@cache
def int8_product(groups: int) -> tuple[str, str]:
    """The same over HI4 and int8, added to sums that come last: per group, four of them.

    The words of a token are operands as they are: per group, four of low nibbles' inputs (the upper
    half of a byte of HI4), then four of high ones'.
    """
    outs = 4 * groups
    rows = [_operands(outs + 4 * r, 4) for r in (0, 1)]
    before = _operands(outs + 8 + 8 * groups, outs)
    sums = [[f"s{j}{i}" for i in range(4)] for j in range(groups)]
    flat = [name for group in sums for name in group]
    lines = [f".reg .b32 a0, a1, b0, b1, {', '.join(flat)};"]
    lines += [f"mov.b32 {name}, {old};" for name, old in zip(flat, before, strict=True)]
    for w in range(4):
        for r in (0, 1):
            lines += [f"and.b32 a{r}, {rows[r][w]}, 0xF0F0F0F0;",
                      f"shl.b32 b{r}, {rows[r][w]}, 4;",
                      f"and.b32 b{r}, b{r}, 0xF0F0F0F0;"]  # fmt: skip
        for j in range(groups):
            first = outs + 8 + 8 * j + w
            right = [f"${first}", f"${first + 4}"]
            lines.append(_product(_INT8, sums[j], ["a0", "a1", "b0", "b1"], right))
    lines += [f"mov.b32 ${i}, {name};" for i, name in enumerate(flat)]
    return _block(lines), ",".join(["=r"] * outs + ["r"] * (8 + 12 * groups))
