"""How relevant each vision token is to a question: a cosine, min-maxed over its image, shaped.

With c_n the cosine of token n to the question times a sign, and c' = (c - min c) / (max c - min c),

    floor: max(c', FLOOR)    exp: e^(w (c' - 1))    raw: c'    offset: c' + 1e-6 / (max c - min c)

Where all cosines are equal within rounding, or one is not finite, r = 1.
"""

from __future__ import annotations

import math

import torch

from .launch import constant, jit, next_power_of_2, tl

__all__ = ["FLOOR", "FORMS", "relevance", "relevance_ref", "shape_relevance"]

FORMS = ("floor", "exp", "raw", "offset")
# the least relevant token stays selectable: r = 0 could never be chosen before residuals run out
FLOOR = 1e-3
_FLOOR = constant(FLOOR)
_TINY = constant(torch.finfo(torch.float32).tiny)


def relevance(
    tokens: torch.Tensor, query: torch.Tensor, *, sign: int, form: str, weight: float
) -> torch.Tensor:
    """r `[B, N]` of `tokens [B, N, C]` under one question per image, `query [B, C]`; fp32.

    `weight` is w of the form "exp".
    """
    fused = tokens.is_cuda and tokens.dtype != torch.float64
    run = relevance_triton if fused else relevance_ref
    return run(tokens, query, sign=sign, form=form, weight=weight)


def relevance_ref(
    tokens: torch.Tensor, query: torch.Tensor, *, sign: int, form: str, weight: float
) -> torch.Tensor:
    """`relevance` in torch."""
    # image by image: a batched product rounds differently, and nobody's neighbours may matter
    pairs = zip(_unit(query), _unit(tokens), strict=True)
    raw = torch.stack([(one[None] @ rows.mT)[0] for one, rows in pairs])
    return shape_relevance(sign * raw, form, weight)


def _unit(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide / length.clamp_min(1e-12)


def shape_relevance(raw: torch.Tensor, form: str, weight: float) -> torch.Tensor:
    """r of the signed similarities `raw [..., N]`."""
    low, high = raw.amin(-1, keepdim=True), raw.amax(-1, keepdim=True)
    tiny = torch.finfo(raw.dtype).tiny
    flat = ~((high - low) > 1e-6 * raw.abs().amax(-1, keepdim=True))
    flat |= ~raw.isfinite().all(-1, keepdim=True)
    shaped = (raw - low) / (high - low).clamp_min(tiny)
    if form == "floor":
        shaped = shaped.clamp_min(FLOOR)
    elif form == "exp":
        shaped = torch.exp(weight * (shaped - 1))
    elif form == "offset":
        shaped = shaped + 1e-6 / (high - low).clamp_min(tiny)
    return torch.where(flat, 1.0, shaped)


@jit
def _cosine_to_query_kernel(
    tokens: tl.tensor, query: tl.tensor, raw: tl.tensor, num_tokens: tl.tensor, C: tl.tensor,
    sign: tl.tensor, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK tokens of one image per program."""
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < num_tokens
    b_dot = tl.zeros((BLOCK,), tl.float32)
    b_own = tl.zeros((BLOCK,), tl.float32)
    query_sum = 0.0
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_q = tl.load(query + i_b * C + o_c, m_c, 0.0).to(tl.float32)
        o_x = (i_b * num_tokens + o_n)[:, None] * C + o_c[None, :]
        b_x = tl.load(tokens + o_x, m_n[:, None] & m_c[None, :], 0.0).to(tl.float32)
        b_dot += tl.sum(b_x * b_q[None, :], axis=1)
        b_own += tl.sum(b_x * b_x, axis=1)
        query_sum += tl.sum(b_q * b_q, axis=0)
    b_length = tl.maximum(tl.sqrt(b_own), 1e-12) * tl.maximum(tl.sqrt(query_sum), 1e-12)
    tl.store(raw + i_b * num_tokens + o_n, sign * b_dot / b_length, m_n)


@jit
def _shape_kernel(
    raw: tl.tensor, out: tl.tensor, num_tokens: tl.tensor, weight: tl.tensor, form: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One image per program; `form` is its place in the list of forms."""
    i_b = tl.program_id(0).to(tl.int64)
    raw += i_b * num_tokens
    o_b = tl.arange(0, BLOCK)
    b_low = tl.full((BLOCK,), float("inf"), tl.float32)
    b_high = tl.full((BLOCK,), float("-inf"), tl.float32)
    b_odd = tl.zeros((BLOCK,), tl.int32)
    for i_n in range(0, num_tokens, BLOCK):
        m_n = i_n + o_b < num_tokens
        b_raw = tl.load(raw + i_n + o_b, m_n, 0.0)
        b_low = tl.where(m_n, tl.minimum(b_low, b_raw), b_low)
        b_high = tl.where(m_n, tl.maximum(b_high, b_raw), b_high)
        # neither NaN nor infinite
        b_odd |= (m_n & ((b_raw - b_raw) != 0.0)).to(tl.int32)
    low, high = tl.min(b_low, axis=0), tl.max(b_high, axis=0)
    width = tl.maximum(high - low, _TINY)
    varied = (high - low) > 1e-6 * tl.maximum(tl.abs(low), tl.abs(high))
    varied = varied & (tl.max(b_odd, axis=0) == 0)
    for i_n in range(0, num_tokens, BLOCK):
        m_n = i_n + o_b < num_tokens
        b_r = (tl.load(raw + i_n + o_b, m_n, 0.0) - low) / width
        if form == 0:
            b_r = tl.maximum(b_r, _FLOOR)
        if form == 1:
            b_r = tl.exp(weight * (b_r - 1.0))
        if form == 3:
            b_r += 1e-6 / width
        tl.store(out + i_b * num_tokens + i_n + o_b, tl.where(varied, b_r, 1.0), m_n)


def relevance_triton(
    tokens: torch.Tensor, query: torch.Tensor, *, sign: int, form: str, weight: float
) -> torch.Tensor:
    """`relevance` on the device of `tokens`."""
    batch, size, width = tokens.shape
    raw = torch.empty(batch, size, dtype=torch.float32, device=tokens.device)
    out = torch.empty(batch, size, dtype=torch.float32, device=tokens.device)
    if not out.numel():
        return out
    block_c = min(next_power_of_2(width), 512)
    _cosine_to_query_kernel[(batch, math.ceil(size / 8))](
        tokens.contiguous(), query.contiguous(), raw, size, width, float(sign), BLOCK=8,
        BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    _shape_kernel[(batch,)](
        raw, out, size, float(weight), FORMS.index(form), BLOCK=1024, num_warps=8
    )
    return out
