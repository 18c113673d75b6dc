"""Decoding over INT4 KV by programs of one warp, whose codes never leave the lanes they came to.

The maths is that of `quantized_attention`. Tiles are turned around: keys and channels are the rows
of the matrix instruction and up to eight query heads its columns, half of what sixteen rows of
queries would compute. A lane loads the codes it multiplies itself (see `warp_blocks`), so nothing
goes through shared memory and no warp waits for another; the loads of the next tile are under way
while this one is multiplied. Every tensor here has 32 elements, one per lane: a register.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .kv_codes import KVFormat
from .launch import jit, tl
from .position_splits import split_span
from .warp_blocks import add_rows, load_words, max_rows, outputs, scores, weights

if TYPE_CHECKING:
    from .kv_codes import QuantKV

__all__ = ["WarpConfig", "assembly", "decode_warps_kernel", "fits_warps"]


@dataclass(frozen=True, slots=True)
class WarpConfig:
    """Groups of 16 positions per step, programs per multiprocessor, and registers a thread."""

    groups: int = 2
    occupancy: int = 12
    max_registers: int | None = 168
    num_warps: int = 1


def fits_warps(kv: QuantKV, group: int) -> bool:
    """Whether `decode_warps_kernel` can read `kv` for `group` query heads per KV head."""
    strides = kv.codes.stride()[:3]
    aligned = kv.codes.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in strides)
    whole = kv.head_dim in (64, 128) and kv.codes.shape[1] % 16 == 0
    return kv.format is KVFormat.INT4 and group <= 8 and whole and aligned


@cache
def assembly(words: int) -> dict[str, str]:
    """The blocks of a kernel whose heads have 32 `words` channels, as its constants."""
    blocks = {"SCORES": scores(words), "OUTPUTS": outputs(words), "WEIGHTS": weights(),
              "KEYS": load_words(words), "VALUES": load_words(words // 2), "MOST": max_rows(),
              "TOTAL": add_rows()}  # fmt: skip
    texts = {name: text for name, (text, _) in blocks.items()}
    return texts | {f"{name}_IO": constraints for name, (_, constraints) in blocks.items()}


@jit
def _none() -> tl.tensor:
    """No registers yet."""
    return ()


@jit
def _blocks_of(
    table: tl.tensor, i_n: tl.tensor, last: tl.tensor, BLOCK_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The block of each group of 16 positions from `i_n`; past the `last` group, of that."""
    found = _none()
    for i in tl.static_range(GROUPS):
        found += (tl.load(table + tl.minimum(i_n + 16 * i, last) // BLOCK_SIZE),)
    return found


@jit
def _load_codes(
    codes: tl.tensor, blocks: tl.tensor, i_n: tl.tensor, last: tl.tensor, o_lane: tl.tensor,
    stride_block: tl.tensor, stride_row: tl.tensor, BLOCK_SIZE: tl.constexpr,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr,
    IO: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """WORDS words of each of the rows STEPS, counted from the lane's own, of every group."""
    found = _none()
    for i in tl.static_range(GROUPS):
        row = tl.minimum(i_n + 16 * i, last) % BLOCK_SIZE
        p_group = codes + blocks[i].to(tl.int64) * stride_block + row * stride_row
        for s in tl.static_range(len(STEPS)):
            p_row = (p_group + o_lane + STEPS[s] * stride_row).to(tl.int64)
            if WORDS == 1:
                found += (tl.inline_asm_elementwise(ASM, IO, [p_row], dtype=tl.int32,
                                                    is_pure=False, pack=1),)  # fmt: skip
            else:
                found += tl.inline_asm_elementwise(ASM, IO, [p_row], dtype=(tl.int32,) * WORDS,
                                                   is_pure=False, pack=1)  # fmt: skip
    return found


@jit
def _load_scales(
    scales: tl.tensor, blocks: tl.tensor, i_n: tl.tensor, last: tl.tensor, o_lane: tl.tensor,
    stride_block: tl.tensor, stride_row: tl.tensor, BLOCK_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Scale and zero of rows g and g + 8 of every group, as they lie in memory."""
    found = _none()
    for i in tl.static_range(GROUPS):
        row = tl.minimum(i_n + 16 * i, last) % BLOCK_SIZE
        p_group = scales + blocks[i].to(tl.int64) * stride_block + row * stride_row
        for s in tl.static_range(2):
            found += (tl.load(p_group + o_lane + 8 * s * stride_row),)
    return found


@jit
def _scale(b_bits: tl.tensor) -> tl.tensor:
    return (b_bits & -16).to(tl.float32, bitcast=True)


@jit
def _zero(b_bits: tl.tensor) -> tl.tensor:
    """The integer below 16 as fp32, by placing it under the exponent of 2^23."""
    return ((b_bits & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@jit
def _half_bits(b_x: tl.tensor) -> tl.tensor:
    return b_x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@jit
def _queries(
    p_q: tl.tensor, m_q: tl.tensor, o_t: tl.tensor, HALF: tl.constexpr, WORDS: tl.constexpr
) -> tl.tensor:
    """Registers of query g for `scores`, its sum over this lane's channels, and their top."""
    loaded = _none()
    top = tl.full((32,), 1e-30, tl.float32)
    for w in tl.static_range(WORDS):
        for h in tl.static_range(2):
            for b in tl.static_range(4):
                p_c = p_q + o_t * (4 * WORDS) + (4 * w + b + HALF * h)
                b_q = tl.load(p_c, mask=m_q, other=0.0).to(tl.float32)
                top = tl.maximum(top, tl.abs(b_q))
                loaded += (b_q,)
    top = tl.max(top, axis=0)
    registers = _none()
    b_sum = tl.zeros((32,), tl.float32)
    for i in tl.static_range(2 * WORDS):
        # high nibbles weigh 2^4 as much as low ones
        share = 0.0625 if i % 2 else 1.0
        b_0, b_1 = loaded[4 * i] * share / top, loaded[4 * i + 1] * share / top
        b_2, b_3 = loaded[4 * i + 2] * share / top, loaded[4 * i + 3] * share / top
        registers += (_half_bits(b_0) | (_half_bits(b_2) << 16),)
        registers += (_half_bits(b_1) | (_half_bits(b_3) << 16),)
        b_part = b_0.to(tl.float16).to(tl.float32) + b_1.to(tl.float16).to(tl.float32)
        b_part += b_2.to(tl.float16).to(tl.float32) + b_3.to(tl.float16).to(tl.float32)
        b_sum += b_part / share
    return registers, b_sum, top


@jit
def decode_warps_kernel(
    q: tl.tensor, k_codes: tl.tensor, v_codes: tl.tensor, k_scales: tl.tensor,
    v_scales: tl.tensor, out: tl.tensor, partial: tl.tensor, stats: tl.tensor,
    block_tables: tl.tensor, cu_seqlens_q: tl.tensor, seq_lens: tl.tensor, limits: tl.tensor,
    scale_log2: tl.tensor, q_stride_t: tl.tensor, q_stride_h: tl.tensor, stride_block: tl.tensor,
    stride_row: tl.tensor, stride_head: tl.tensor, scale_stride_block: tl.tensor,
    scale_stride_row: tl.tensor, scale_stride_head: tl.tensor, table_stride: tl.tensor,
    num_splits: tl.tensor, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    GROUPS: tl.constexpr, LIMITED: tl.constexpr, SCORES: tl.constexpr, SCORES_IO: tl.constexpr,
    OUTPUTS: tl.constexpr, OUTPUTS_IO: tl.constexpr, WEIGHTS: tl.constexpr,
    WEIGHTS_IO: tl.constexpr, KEYS: tl.constexpr, KEYS_IO: tl.constexpr, VALUES: tl.constexpr,
    VALUES_IO: tl.constexpr, MOST: tl.constexpr, MOST_IO: tl.constexpr, TOTAL: tl.constexpr,
    TOTAL_IO: tl.constexpr,
) -> None:  # fmt: skip
    """One split of a sequence of one query and KV head, writing what `_decode_codes_kernel` writes.

    Of an empty split only its stats are written. The sum of `scores` and `outputs` over codes is in
    units of 2^-24, and weights are lifted by 2^6, as in `coded_tile`.
    """
    WORDS: tl.constexpr = HALF // 16
    TILE: tl.constexpr = 16 * GROUPS
    UNIT: tl.constexpr = 2.0**24
    i_s, i_h, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_t = tl.load(cu_seqlens_q + i_s).to(tl.int64)
    if tl.load(cu_seqlens_q + i_s + 1) == i_t + 1:
        seq_len = tl.load(seq_lens + i_s)
        if LIMITED:
            seq_len = tl.maximum(tl.minimum(tl.load(limits + i_t), seq_len), 0)
        start, end = split_span(seq_len, i_split, num_splits, TILE)
        lane = tl.arange(0, 32)
        o_g, o_t = lane // 4, lane % 4
        heads = tl.num_programs(1) * GROUP
        o_row = (i_s.to(tl.int64) * heads + i_h * GROUP + 2 * o_t) * num_splits + i_split
        m_0, m_1 = 2 * o_t < GROUP, 2 * o_t + 1 < GROUP
        p_out = out + (i_t * heads + i_h * GROUP + 2 * o_t) * (2 * HALF)
        if start < end:
            last = (end - 1) // 16 * 16
            table = block_tables + i_s.to(tl.int64) * table_stride
            k_codes += i_h * stride_head
            v_codes += i_h * stride_head
            k_scales += i_h * scale_stride_head
            v_scales += i_h * scale_stride_head
            o_k = o_g * stride_row + o_t * (4 * WORDS)
            o_v = 2 * o_t * stride_row + o_g * (2 * WORDS)
            o_s = o_g * scale_stride_row
            p_q = q + i_t * q_stride_t + (i_h * GROUP + o_g) * q_stride_h
            b_q, b_sum, top = _queries(p_q, o_g < GROUP, o_t, HALF, WORDS)
            b_sum = tl.sum(tl.reshape(b_sum, (8, 4)), axis=1) * (1.0 / UNIT)
            sum_0, sum_1 = tl.split(tl.reshape(b_sum, (4, 2)))
            sum_0 = tl.reshape(tl.broadcast_to(sum_0[None, :], (8, 4)), (32,))
            sum_1 = tl.reshape(tl.broadcast_to(sum_1[None, :], (8, 4)), (32,))
            unit = top * scale_log2 * UNIT
            blocks = _blocks_of(table, start, last, BLOCK_SIZE, GROUPS)
            b_k = _load_codes(k_codes, blocks, start, last, o_k, stride_block, stride_row,
                              BLOCK_SIZE, GROUPS, (0, 8), WORDS, KEYS, KEYS_IO)  # fmt: skip
            b_v = _load_codes(v_codes, blocks, start, last, o_v, stride_block, stride_row,
                              BLOCK_SIZE, GROUPS, (0, 1, 8, 9), WORDS // 2, VALUES,
                              VALUES_IO)  # fmt: skip
            b_ks = _load_scales(k_scales, blocks, start, last, o_s, scale_stride_block,
                                scale_stride_row, BLOCK_SIZE, GROUPS)  # fmt: skip
            b_vs = _load_scales(v_scales, blocks, start, last, o_s, scale_stride_block,
                                scale_stride_row, BLOCK_SIZE, GROUPS)  # fmt: skip
            blocks = _blocks_of(table, start + TILE, last, BLOCK_SIZE, GROUPS)
            nothing = tl.zeros((32,), tl.float32)
            top_0, top_1 = nothing - float("inf"), nothing - float("inf")
            l_0, l_1, y_0, y_1 = nothing, nothing, nothing, nothing
            b_o = (nothing,) * (8 * WORDS)
            for i_n in range(start, end, TILE):
                i_next = i_n + TILE
                b_s = _none()
                for i in tl.static_range(GROUPS):
                    b_s += tl.inline_asm_elementwise(
                        SCORES, SCORES_IO, b_k[2 * WORDS * i : 2 * WORDS * (i + 1)] + b_q,
                        dtype=(tl.float32,) * 4, is_pure=True, pack=1,
                    )  # fmt: skip
                b_k = _load_codes(k_codes, blocks, i_next, last, o_k, stride_block, stride_row,
                                  BLOCK_SIZE, GROUPS, (0, 8), WORDS, KEYS, KEYS_IO)  # fmt: skip
                scored = _none()
                most_0, most_1 = top_0, top_1
                for i in tl.static_range(2 * GROUPS):
                    b_z, b_scale = _zero(b_ks[i]), _scale(b_ks[i]) * unit
                    m_n = i_n + 8 * i + o_g < end
                    s_0 = tl.where(m_n, (b_s[2 * i] - sum_0 * b_z) * b_scale, float("-inf"))
                    s_1 = tl.where(m_n, (b_s[2 * i + 1] - sum_1 * b_z) * b_scale, float("-inf"))
                    most_0, most_1 = tl.maximum(most_0, s_0), tl.maximum(most_1, s_1)
                    scored += (s_0, s_1)
                b_ks = _load_scales(k_scales, blocks, i_next, last, o_s, scale_stride_block,
                                    scale_stride_row, BLOCK_SIZE, GROUPS)  # fmt: skip
                most_0, most_1 = tl.inline_asm_elementwise(
                    MOST, MOST_IO, [most_0, most_1], dtype=(tl.float32, tl.float32), is_pure=True,
                    pack=1,
                )  # fmt: skip
                decay_0, decay_1 = tl.exp2(top_0 - most_0), tl.exp2(top_1 - most_1)
                top_0, top_1 = most_0, most_1
                l_0, l_1, y_0, y_1 = l_0 * decay_0, l_1 * decay_1, y_0 * decay_0, y_1 * decay_1
                b_w = _none()
                for i in tl.static_range(2 * GROUPS):
                    m_n = i_n + 8 * i + o_g < end
                    b_scale = tl.where(m_n, _scale(b_vs[i]) * 64.0, 0.0)
                    b_z = _zero(b_vs[i])
                    p_0, p_1 = tl.exp2(scored[2 * i] - top_0), tl.exp2(scored[2 * i + 1] - top_1)
                    l_0, l_1 = l_0 + p_0, l_1 + p_1
                    b_turned, w_0, w_1 = tl.inline_asm_elementwise(
                        WEIGHTS, WEIGHTS_IO, [p_0 * b_scale, p_1 * b_scale],
                        dtype=(tl.int32, tl.float32, tl.float32), is_pure=True, pack=1,
                    )  # fmt: skip
                    y_0, y_1 = y_0 + w_0 * b_z, y_1 + w_1 * b_z
                    b_w += (b_turned,)
                b_vs = _load_scales(v_scales, blocks, i_next, last, o_s, scale_stride_block,
                                    scale_stride_row, BLOCK_SIZE, GROUPS)  # fmt: skip
                decayed = _none()
                for i in tl.static_range(4 * WORDS):
                    decayed += (b_o[2 * i] * decay_0, b_o[2 * i + 1] * decay_1)
                b_o = decayed
                for i in tl.static_range(GROUPS):
                    b_o = tl.inline_asm_elementwise(
                        OUTPUTS, OUTPUTS_IO,
                        b_v[2 * WORDS * i : 2 * WORDS * (i + 1)] + b_w[2 * i : 2 * i + 2] + b_o,
                        dtype=(tl.float32,) * (8 * WORDS), is_pure=True, pack=1,
                    )  # fmt: skip
                b_v = _load_codes(v_codes, blocks, i_next, last, o_v, stride_block, stride_row,
                                  BLOCK_SIZE, GROUPS, (0, 1, 8, 9), WORDS // 2, VALUES,
                                  VALUES_IO)  # fmt: skip
                blocks = _blocks_of(table, i_next + TILE, last, BLOCK_SIZE, GROUPS)
            l_0, l_1 = tl.inline_asm_elementwise(
                TOTAL, TOTAL_IO, [l_0, l_1], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
            )
            y_0, y_1 = tl.inline_asm_elementwise(
                TOTAL, TOTAL_IO, [y_0, y_1], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
            )
            done = _none()
            for i in tl.static_range(4 * WORDS):
                factor = UNIT if i < 2 * WORDS else UNIT / 16
                done += ((b_o[2 * i] * factor - y_0) * 0.015625,)
                done += ((b_o[2 * i + 1] * factor - y_1) * 0.015625,)
            if num_splits == 1:
                for i in tl.static_range(4 * WORDS):
                    p_c = p_out + 2 * WORDS * o_g + i % (2 * WORDS) + HALF * (i // (2 * WORDS))
                    tl.store(p_c, (done[2 * i] / l_0).to(out.dtype.element_ty), mask=m_0)
                    b_next = (done[2 * i + 1] / l_1).to(out.dtype.element_ty)
                    tl.store(p_c + 2 * HALF, b_next, mask=m_1)
            else:
                p_0, p_1 = partial + o_row * (2 * HALF), partial + (o_row + num_splits) * (2 * HALF)
                for i in tl.static_range(4 * WORDS):
                    o_c = 2 * WORDS * o_g + i % (2 * WORDS) + HALF * (i // (2 * WORDS))
                    tl.store(p_0 + o_c, done[2 * i], mask=m_0)
                    tl.store(p_1 + o_c, done[2 * i + 1], mask=m_1)
                m_g = o_g == 0
                tl.store(stats + o_row * 2, top_0, mask=m_0 & m_g)
                tl.store(stats + o_row * 2 + 1, l_0, mask=m_0 & m_g)
                tl.store(stats + (o_row + num_splits) * 2, top_1, mask=m_1 & m_g)
                tl.store(stats + (o_row + num_splits) * 2 + 1, l_1, mask=m_1 & m_g)
        elif num_splits > 1:
            unseen, m_g = tl.full((32,), float("-inf"), tl.float32), o_g == 0
            tl.store(stats + o_row * 2, unseen, mask=m_0 & m_g)
            tl.store(stats + o_row * 2 + 1, tl.exp2(unseen), mask=m_0 & m_g)
            tl.store(stats + (o_row + num_splits) * 2, unseen, mask=m_1 & m_g)
            tl.store(stats + (o_row + num_splits) * 2 + 1, tl.exp2(unseen), mask=m_1 & m_g)
        else:
            empty = tl.zeros((32,), out.dtype.element_ty)
            for i in tl.static_range(4 * WORDS):
                o_c = 2 * WORDS * o_g + i % (2 * WORDS) + HALF * (i // (2 * WORDS))
                tl.store(p_out + o_c, empty, mask=m_0)
                tl.store(p_out + 2 * HALF + o_c, empty, mask=m_1)
