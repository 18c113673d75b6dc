"""RMSNorm, alone and with the residual addition before it.

    y = w * round(x / sqrt(mean(x^2) + eps))

The mean and the division are in fp32; the quotient is rounded to the input dtype *before* the
weight multiplies it, as Llama's released modelling code does, so logits compare bit for bit in
fp32. `add_rms_norm` first forms r' = round(x + r), which is both normalised and returned as the
next residual: one read of x and r, one write of y and r'.
"""

from __future__ import annotations

import torch

from .launch import jit, next_power_of_2, row_warps, tl

__all__ = ["add_rms_norm", "add_rms_norm_ref", "rms_norm", "rms_norm_ref"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x [..., D]` normalised over its last dimension and scaled by `weight [D]`."""
    return rms_norm_triton(x, weight, eps) if x.is_cuda else rms_norm_ref(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x + residual`, and the sum itself; all `[..., D]` of one dtype."""
    run = add_rms_norm_triton if x.is_cuda else add_rms_norm_ref
    return run(x, residual, weight, eps)


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in torch."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in torch."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


@jit
def _rms_norm_kernel(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, out: tl.tensor, total: tl.tensor,
    stride_t: tl.tensor, stride_h: tl.tensor, heads: tl.tensor, eps: tl.tensor, D: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
) -> None:  # fmt: skip
    """One row per program; row r is token r // heads, head r % heads. Outputs are contiguous."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_x = (i_row // heads) * stride_t + (i_row % heads) * stride_h + o_d
    b_x = tl.load(x + o_x, mask=m_d, other=0.0)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0)  # not after the sum, which all wait for
    if HAS_RESIDUAL:
        b_x += tl.load(residual + i_row * D + o_d, mask=m_d, other=0.0)
        tl.store(total + i_row * D + o_d, b_x, mask=m_d)
    b_wide = b_x.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_wide * b_wide, axis=0) / D + eps)
    b_unit = (b_wide * b_scale).to(b_x.dtype)
    tl.store(out + i_row * D + o_d, (b_w * b_unit).to(out.dtype.element_ty), mask=m_d)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` on the device of `x`; a `[T, H, D]` view is read through its strides."""
    out = x.new_empty(x.shape)
    _launch(_rows(x), None, weight, out, None, eps)
    return out


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` on the device of `x`."""
    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(_rows(x), residual.contiguous(), weight, out, total, eps)
    return out, total


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as `[T, H, D]` with unit stride in D, without a copy where its strides allow."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1])


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor,
    total: torch.Tensor | None, eps: float,
) -> None:  # fmt: skip
    tokens, heads, width = x.shape
    assert weight.shape == (width,) and weight.is_contiguous()
    if not x.numel():
        return
    _rms_norm_kernel[(tokens * heads,)](
        x, residual, weight, out, total, x.stride(0), x.stride(1), heads, eps,
        D=width, BLOCK_D=next_power_of_2(width), HAS_RESIDUAL=residual is not None,
        num_warps=row_warps(width),
    )  # fmt: skip
