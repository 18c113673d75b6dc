"""From packed bytes to the operands of a matrix product, four bytes at a time.

Each decoder has an inline-assembly form for the compiler and a portable twin, bit-equal to it, for
the interpreter.
"""

from __future__ import annotations

from typing import Any

from .launch import constant, jit, tl

__all__ = ["await_products", "joined", "load_tokens", "operands", "wide_operand"]

# $2 holds four packed bytes; $0 and $1 receive their A and B operands
_U4_PTX = constant("""
    and.b32 $0, $2, 0x0F0F0F0F;
    shr.u32 $1, $2, 4;
    and.b32 $1, $1, 0x0F0F0F0F;
""")
_HI4_PTX = constant("""
    and.b32 $0, $2, 0xF0F0F0F0;
    shl.b32 $1, $2, 4;
    and.b32 $1, $1, 0xF0F0F0F0;
""")
# a byte below the exponent of 128 is the bf16 number 128 + byte, and below that of 1024 in fp16
_WIDE_PTX = """{
    .reg .b32 low, high, centre;
    mov.b32 centre, CENTRE;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, EXPONENT, 0x4140;
    prmt.b32 $1, low, EXPONENT, 0x4342;
    prmt.b32 $2, high, EXPONENT, 0x4140;
    prmt.b32 $3, high, EXPONENT, 0x4342;
    sub.TYPE $0, $0, centre;
    sub.TYPE $1, $1, centre;
    sub.TYPE $2, $2, centre;
    sub.TYPE $3, $3, centre;
}"""


def _wide_ptx(exponent: str, kind: str, centre: str) -> Any:
    text = _WIDE_PTX.replace("EXPONENT", exponent).replace("TYPE", kind)
    return constant(text.replace("CENTRE", centre))


_BF16_PTX = _wide_ptx("0x43434343", "bf16x2", "0x43084308")
_FP16_PTX = _wide_ptx("0x64646464", "f16x2", "0x64086408")
_SM7_PTX = constant("""{
    .reg .b32 magnitude, sign;
    and.b32 $0, $2, 0x87878787;
    shr.u32 magnitude, $2, 4;
    and.b32 magnitude, magnitude, 0x07070707;
    shl.b32 sign, $2, 4;
    and.b32 sign, sign, 0x80808080;
    or.b32 $1, magnitude, sign;
}""")

_WAIT = constant("wgmma.wait_group.sync.aligned 0; // $0 $1")


@jit
def operands(
    b_q: tl.tensor, FORMAT: tl.constexpr, dtype: tl.constexpr, USE_PTX: tl.constexpr
) -> tl.tensor:
    """The two matrix operands a block of bytes carries.

    Where they are 16 or 32 bits wide they are codes, centred on 0. The PTX forms do four bytes per
    instruction and are bit-equal to the portable ones.
    """
    bits: tl.constexpr = dtype.primitive_bitwidth
    if USE_PTX and dtype == tl.bfloat16:
        b_a, b_b = tl.inline_asm_elementwise(
            _BF16_PTX, "=r,=r,=r,=r,r", [b_q], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif USE_PTX and dtype == tl.float16:
        b_a, b_b = tl.inline_asm_elementwise(
            _FP16_PTX, "=r,=r,=r,=r,r", [b_q], (tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif bits > 8:
        b_a = ((b_q & 0x0F).to(tl.int8) - 8).to(dtype)
        b_b = ((b_q >> 4).to(tl.int8) - 8).to(dtype)
    elif USE_PTX:
        other: tl.constexpr = _HI4_PTX if FORMAT == "hi4" else _U4_PTX
        asm: tl.constexpr = _SM7_PTX if FORMAT == "sm7" else other
        b_a, b_b = tl.inline_asm_elementwise(
            asm, "=r,=r,r", [b_q], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    elif FORMAT == "sm7":
        b_a = b_q & 0x87
        b_b = ((b_q >> 4) & 0x07) | ((b_q << 4) & 0x80)
    elif FORMAT == "hi4":
        b_a = b_q & 0xF0
        b_b = b_q << 4
    else:
        b_a = b_q & 0x0F
        b_b = b_q >> 4
    if bits == 8:
        b_a, b_b = b_a.to(dtype, bitcast=True), b_b.to(dtype, bitcast=True)
    return b_a, b_b


@jit
def joined(b_left: tl.tensor, b_right: tl.tensor) -> tl.tensor:
    """The columns of `b_left`, then those of `b_right`: one operand, and no register moves."""
    ROWS: tl.constexpr = b_left.shape[0]
    COLUMNS: tl.constexpr = 2 * b_left.shape[1]
    return tl.reshape(tl.permute(tl.join(b_left, b_right), (0, 2, 1)), (ROWS, COLUMNS))


@jit
def wide_operand(
    p_data: tl.tensor, i: tl.tensor, TILE: tl.constexpr, STEPS: tl.constexpr, FORMAT: tl.constexpr,
    dtype: tl.constexpr, USE_PTX: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The operand `[rows, 128 STEPS]` of one or two tiles of bytes from tile `i` on."""
    b_a, b_b = operands(tl.load(p_data + i * TILE), FORMAT, dtype, USE_PTX)
    b_w = joined(b_a, b_b)
    if STEPS == 2:
        b_a, b_b = operands(tl.load(p_data + (i + 1) * TILE), FORMAT, dtype, USE_PTX)
        b_w = joined(b_w, joined(b_a, b_b))
    return b_w


@jit
def load_tokens(p_x: tl.tensor, m_m: tl.tensor) -> tl.tensor:
    """Activations, inputs by tokens; where tokens are few, those of missing ones are not asked for.

    All programs want the same at once, and every request counts.
    """
    if m_m.shape[0] <= 32:
        return tl.load(p_x, mask=m_m[None, :], other=0.0)
    return tl.load(p_x)


@jit
def await_products(i: tl.tensor, WGMMA: tl.constexpr) -> None:
    """Wait for all products of Hopper's tensor core, before their registers are decoded anew.

    A product whose left operand lies in registers reads them until it is waited for. Triton 3.6
    lets one whose sum only the next trip of the loop uses run on into that trip.
    """
    if WGMMA:
        tl.inline_asm_elementwise(_WAIT, "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1)
