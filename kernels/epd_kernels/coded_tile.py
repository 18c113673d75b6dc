"""The tile loop of attention over coded keys and values, shared by decode and prefill.

The sixteen fp16 words 0000 000u are the subnormals u / 2^24, and 0000 00u0 are u / 2^20: a mask
makes two matrix operands of each byte. Scales, zeros and the powers of two are applied to scores
and outputs (see `quantized_attention`). Queries are divided by the largest of their tile and
weights multiplied by a constant, so that fp16 holds both; FP8 codes are widened to fp16, which is
exact. Sums are fp32.
"""

from __future__ import annotations

from .launch import constant, jit, tl

__all__ = ["attend_codes", "scales_zeros"]

# $4 holds four bytes; $0, $1 receive their low and $2, $3 their high nibbles, each one fp16
_NIBBLES_PTX = constant("""{
    .reg .b32 first, second;
    prmt.b32 first, $4, 0, 0x4140;
    prmt.b32 second, $4, 0, 0x4342;
    and.b32 $0, first, 0x000F000F;
    and.b32 $1, second, 0x000F000F;
    and.b32 $2, first, 0x00F000F0;
    and.b32 $3, second, 0x00F000F0;
}""")


@jit
def _nibbles(b_c: tl.tensor, PURE: tl.constexpr, USE_PTX: tl.constexpr) -> tl.tensor:
    """Low nibbles as u / 2^24 and high ones as u / 2^20, in fp16.

    An asm block that is not PURE stays where it is: else the compiler would move the change of
    layout before it, and load values from shared memory byte by byte.
    """
    if USE_PTX:
        b_low, b_high = tl.inline_asm_elementwise(
            _NIBBLES_PTX, "=r,=r,=r,=r,r", [b_c], dtype=(tl.float16, tl.float16), is_pure=PURE,
            pack=4,
        )  # fmt: skip
    else:
        b_low = (b_c & 0x0F).to(tl.uint16).to(tl.float16, bitcast=True)
        b_high = (b_c & 0xF0).to(tl.uint16).to(tl.float16, bitcast=True)
    return b_low, b_high


@jit
def _load_halves(
    p_codes: tl.tensor, m_codes: tl.tensor, BITS: tl.constexpr, HALF: tl.constexpr,
    PURE: tl.constexpr, USE_PTX: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Channels 0 .. D/2 and D/2 .. D of a tile of codes, in fp16 and the units of `_UNITS`."""
    if BITS == 4:
        b_low, b_high = _nibbles(tl.load(p_codes, mask=m_codes, other=0), PURE, USE_PTX)
    else:
        b_low = tl.load(p_codes, mask=m_codes, other=0.0).to(tl.float16)
        b_high = tl.load(p_codes + HALF, mask=m_codes, other=0.0).to(tl.float16)
    return b_low, b_high


@jit
def scales_zeros(p_scales: tl.tensor, m_n: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Scale and zero of each position; FP8 has no zeros."""
    b_bits = tl.load(p_scales, mask=m_n, other=0)
    if BITS == 4:
        b_z = (b_bits & 15).to(tl.float32)
        b_bits = b_bits & -16
    else:
        b_z = tl.zeros_like(b_bits).to(tl.float32)
    return b_bits.to(tl.float32, bitcast=True), b_z


@jit
def _attend_tiles(
    b_m: tl.tensor, b_l: tl.tensor, b_y: tl.tensor, b_o1: tl.tensor, b_o2: tl.tensor,
    b_q1: tl.tensor, b_q2: tl.tensor, b_sum: tl.tensor, unit: tl.tensor, o_limit: tl.tensor,
    table: tl.tensor, k_codes: tl.tensor, v_codes: tl.tensor, k_scales: tl.tensor,
    v_scales: tl.tensor, stride_block: tl.tensor, stride_row: tl.tensor,
    scale_stride_block: tl.tensor, scale_stride_row: tl.tensor, start: tl.tensor, end: tl.tensor,
    BLOCK_SIZE: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, USE_PTX: tl.constexpr, LIFT: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The sums after positions [start, end); not MASKED, whole tiles that every row sees."""
    o_c = tl.arange(0, BLOCK_C)
    for i_n in range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end if MASKED else tl.full((BLOCK_N,), True, tl.int1)
        block = tl.load(table + o_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)
        o_row = block * stride_block + (o_n % BLOCK_SIZE) * stride_row
        o_scale = block * scale_stride_block + (o_n % BLOCK_SIZE) * scale_stride_row
        o_kv, m_kv = o_row[:, None] + o_c[None, :], m_n[:, None] & (o_c < HALF)[None, :]
        b_k1, b_k2 = _load_halves(k_codes + o_kv, m_kv, BITS, HALF, True, USE_PTX)
        b_scale, b_z = scales_zeros(k_scales + o_scale, m_n, BITS)
        b_s = tl.dot(b_q2, tl.trans(b_k2), tl.dot(b_q1, tl.trans(b_k1)))
        b_s = (b_s - b_sum[:, None] * b_z[None, :]) * (b_scale * unit)[None, :]
        if MASKED:
            b_s = tl.where(m_n[None, :] & (o_n[None, :] <= o_limit[:, None]), b_s, float("-inf"))
        b_m_next = tl.maximum(b_m, tl.max(b_s, axis=1))
        b_base = b_m_next
        if MASKED:
            b_base = tl.where(b_m_next == float("-inf"), 0.0, b_m_next)  # -inf - -inf is NaN
        b_p = tl.exp2(b_s - b_base[:, None])
        b_decay = tl.exp2(b_m - b_base)
        b_scale, b_z = scales_zeros(v_scales + o_scale, m_n, BITS)
        b_v1, b_v2 = _load_halves(v_codes + o_kv, m_kv, BITS, HALF, False, USE_PTX)
        b_l = b_l * b_decay + tl.sum(b_p, axis=1)
        b_w = tl.minimum(b_p * (b_scale * LIFT)[None, :], 65504.0).to(tl.float16)
        b_y = b_y * b_decay + tl.sum(b_w.to(tl.float32) * b_z[None, :], axis=1)
        b_o1 = tl.dot(b_w, b_v1, b_o1 * b_decay[:, None])
        b_o2 = tl.dot(b_w, b_v2, b_o2 * b_decay[:, None])
        b_m = b_m_next
    return b_m, b_l, b_y, b_o1, b_o2


@jit
def attend_codes(
    p_q: tl.tensor, m_q: tl.tensor, o_limit: tl.tensor, seen_by_all: tl.tensor, table: tl.tensor,
    k_codes: tl.tensor, v_codes: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor,
    stride_block: tl.tensor, stride_row: tl.tensor, scale_stride_block: tl.tensor,
    scale_stride_row: tl.tensor, scale_log2: tl.tensor, start: tl.tensor, end: tl.tensor,
    BLOCK_SIZE: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, USE_PTX: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(m, l, out) of the rows at `p_q` over positions [start, end), row r seeing p <= o_limit[r].

    Positions below `seen_by_all` need no mask. `out` comes as its two halves of channels. m is in
    base-2 units; a row that saw nothing has m = -inf, l = 0, out = 0.
    """
    LOW: tl.constexpr = 2.0**24 if BITS == 4 else 1.0
    HIGH: tl.constexpr = 2.0**20 if BITS == 4 else 1.0
    LIFT: tl.constexpr = 2.0**6 if BITS == 4 else 2.0**12
    b_q1 = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32)
    b_q2 = tl.load(p_q + HALF, mask=m_q, other=0.0).to(tl.float32)
    top = tl.maximum(tl.max(tl.max(tl.abs(b_q1), 1), 0), tl.max(tl.max(tl.abs(b_q2), 1), 0))
    top = tl.maximum(top, 1e-30)
    b_q1 = (b_q1 / top).to(tl.float16)
    b_q2 = (b_q2 * (HIGH / LOW) / top).to(tl.float16)
    b_sum = tl.sum(b_q1.to(tl.float32), 1) + tl.sum(b_q2.to(tl.float32), 1) * (LOW / HIGH)
    b_sum = b_sum * (1.0 / LOW)
    unit = top * scale_log2 * LOW
    b_m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_l = tl.zeros((BLOCK_M,), tl.float32)
    b_y = tl.zeros((BLOCK_M,), tl.float32)
    b_o1 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    b_o2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    open_tiles = tl.maximum(tl.minimum(seen_by_all, end) - start, 0) // BLOCK_N
    middle = start + open_tiles * BLOCK_N
    b_m, b_l, b_y, b_o1, b_o2 = _attend_tiles(
        b_m, b_l, b_y, b_o1, b_o2, b_q1, b_q2, b_sum, unit, o_limit, table, k_codes, v_codes,
        k_scales, v_scales, stride_block, stride_row, scale_stride_block, scale_stride_row, start,
        middle, BLOCK_SIZE, BITS, HALF, BLOCK_N, BLOCK_C, USE_PTX, LIFT, False,
    )  # fmt: skip
    b_m, b_l, b_y, b_o1, b_o2 = _attend_tiles(
        b_m, b_l, b_y, b_o1, b_o2, b_q1, b_q2, b_sum, unit, o_limit, table, k_codes, v_codes,
        k_scales, v_scales, stride_block, stride_row, scale_stride_block, scale_stride_row, middle,
        end, BLOCK_SIZE, BITS, HALF, BLOCK_N, BLOCK_C, USE_PTX, LIFT, True,
    )  # fmt: skip
    b_o1 = (b_o1 * LOW - b_y[:, None]) * (1.0 / LIFT)
    b_o2 = (b_o2 * HIGH - b_y[:, None]) * (1.0 / LIFT)
    return b_m, b_l, b_o1, b_o2
