"""Cosines between all tokens of an image, to an elementwise power: the kernel of a DPP.

    S_ij = (x_i . x_j / (|x_i| |x_j|))^p

A row's cosine to itself is exactly 1, 0 for a zero row, so that rounding decides no argmax.
"""

from __future__ import annotations

import math

import torch

from .graph_score import TILE, inverse_norms_triton
from .launch import jit, tl

__all__ = ["cosines", "cosines_ref"]


def cosines(x: torch.Tensor, *, power: int = 1) -> torch.Tensor:
    """S `[B, N, N]` of the rows of `x [B, N, D]`, fp32 (fp64 of fp64)."""
    fused = x.is_cuda and x.dtype != torch.float64
    return cosines_triton(x, power=power) if fused else cosines_ref(x, power=power)


def cosines_ref(x: torch.Tensor, *, power: int = 1) -> torch.Tensor:
    """`cosines` in torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rows = wide / length.clamp_min(1e-12)
    # image by image: a batched product rounds differently, and nobody's neighbours may matter
    similarity = torch.stack([image @ image.mT for image in rows])
    similarity.diagonal(dim1=-2, dim2=-1).copy_((rows != 0).any(-1))
    return similarity if power == 1 else similarity**power


@jit
def _cosine_kernel(
    x: tl.tensor, inverse: tl.tensor, out: tl.tensor, num_tokens: tl.tensor, D: tl.tensor,
    stride: tl.tensor, power: tl.tensor, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of S per program, and of the zeros that rows of `stride` end in."""
    i_b, i_r, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_r, o_c = i_r * BLOCK + tl.arange(0, BLOCK), i_c * BLOCK + tl.arange(0, BLOCK)
    m_r, m_c = o_r < num_tokens, o_c < num_tokens
    o_x, o_y = i_b * num_tokens + o_r, i_b * num_tokens + o_c
    b_s = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_x = tl.load(x + o_x[:, None] * D + o_d[None, :], m_r[:, None] & m_d[None, :], 0.0)
        b_y = tl.load(x + o_y[:, None] * D + o_d[None, :], m_c[:, None] & m_d[None, :], 0.0)
        b_s = tl.dot(b_x, tl.trans(b_y), b_s, input_precision="ieee")
    b_inverse = tl.load(inverse + o_x, m_r, 0.0)
    b_s = b_s * b_inverse[:, None] * tl.load(inverse + o_y, m_c, 0.0)[None, :]
    # a row of zeros has the largest inverse there is
    b_self = tl.where(b_inverse < 1e12, 1.0, 0.0)
    b_s = tl.where(o_r[:, None] == o_c[None, :], b_self[:, None], b_s)
    b_power = b_s
    for _ in range(1, power):
        b_power *= b_s
    o_out = o_x[:, None] * stride + o_c[None, :]
    tl.store(out + o_out, b_power, m_r[:, None] & (o_c < stride)[None, :])


def cosines_triton(x: torch.Tensor, *, power: int = 1) -> torch.Tensor:
    """`cosines` on the device of `x`, products of the inputs as they are, sums in fp32.

    Rows begin at multiples of 32 elements: whoever reads them does so in whole vectors.
    """
    batch, size, width = x.shape
    stride = 32 * math.ceil(size / 32)
    out = torch.empty(batch, size, stride, dtype=torch.float32, device=x.device)
    if out.numel():
        x = x.contiguous()
        block, block_d, warps = TILE
        tiles = math.ceil(size / block)
        _cosine_kernel[(batch, tiles, tiles)](
            x, inverse_norms_triton(x), out, size, width, stride, power, BLOCK=block,
            BLOCK_D=block_d, num_warps=warps, num_stages=3,
        )  # fmt: skip
    return out[:, :, :size]
