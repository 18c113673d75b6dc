"""The SwiGLU product: out = silu(gate) * up, with gate and up side by side in one row.

silu(g) = g / (1 + exp(-g)) is computed in fp32 and rounded to the input dtype before `up`
multiplies it, which is what two separate torch ops would do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

from .launch import jit, tl

if TYPE_CHECKING:
    import torch

__all__ = ["silu_mul", "silu_mul_ref"]

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`[T, I]` from `gate_up [T, 2I]`: silu of the first half times the second."""
    return silu_mul_triton(gate_up) if gate_up.is_cuda else silu_mul_ref(gate_up)


def silu_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_mul` in torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@jit
def _silu_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor, stride_t: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per token and BLOCK columns."""
    i_t = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < width
    p_gate = gate_up + i_t * stride_t + o_i
    b_gate = tl.load(p_gate, mask=m_i, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + width, mask=m_i, other=0.0)
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(b_up.dtype)
    tl.store(out + i_t * width + o_i, b_silu * b_up, mask=m_i)


def silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_mul` on the device of `gate_up`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] % 2 == 0 and gate_up.stride(1) == 1
    out = gate_up.new_empty(tokens, width)
    if tokens:
        grid = (tokens, -(-width // _BLOCK))
        _silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), width, BLOCK=_BLOCK, num_warps=4)
    return out
