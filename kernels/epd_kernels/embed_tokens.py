"""Decoder inputs in one launch: embeddings of token ids, and vision tokens where an image stands.

    out[t] = vision[sources[t]] if sources[t] >= 0 else table[ids[t]]

A step lays the vision tokens of all its chunks end to end in `vision` and says, per row, which of
them stands there, -1 for text. The id of a placeholder may lie outside the table: it is not used.
A step without images passes `vision` with no row, and captured graphs keep `sources` at -1.
"""

from __future__ import annotations

import torch

from .launch import jit, tl

__all__ = ["embed_tokens", "embed_tokens_ref"]

_BLOCK = 1024


def embed_tokens(
    ids: torch.Tensor, table: torch.Tensor, vision: torch.Tensor, sources: torch.Tensor
) -> torch.Tensor:
    """`[T, h]` in the dtype of `table [V, h]` and `vision [n, h]`.

    `ids [T]` is int64, each below V where `sources [T]` (int32, each below n) is negative.
    """
    run = embed_tokens_triton if table.is_cuda else embed_tokens_ref
    return run(ids, table, vision, sources)


def embed_tokens_ref(
    ids: torch.Tensor, table: torch.Tensor, vision: torch.Tensor, sources: torch.Tensor
) -> torch.Tensor:
    """`embed_tokens` in torch."""
    is_vision = sources >= 0
    hidden = table[ids.masked_fill(is_vision, 0)]
    if not len(vision):
        return hidden
    return torch.where(is_vision[:, None], vision[sources.clamp(min=0)], hidden)


@jit
def _embed_kernel(
    ids: tl.tensor, table: tl.tensor, vision: tl.tensor, sources: tl.tensor, out: tl.tensor,
    stride_table: tl.tensor, stride_vision: tl.tensor, D: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program per token and BLOCK columns."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    source = tl.load(sources + i_t).to(tl.int64)
    if source >= 0:
        b_x = tl.load(vision + source * stride_vision + o_d, m_d)
    else:
        b_x = tl.load(table + tl.load(ids + i_t) * stride_table + o_d, m_d)
    tl.store(out + i_t * D + o_d, b_x, m_d)


def embed_tokens_triton(
    ids: torch.Tensor, table: torch.Tensor, vision: torch.Tensor, sources: torch.Tensor
) -> torch.Tensor:
    """`embed_tokens` on the device of `table`."""
    width = table.shape[1]
    assert vision.dtype == table.dtype and vision.shape[1] == width
    assert table.stride(1) == 1 and ids.shape == sources.shape
    vision = vision if vision.stride(1) == 1 else vision.contiguous()
    out = torch.empty(len(ids), width, dtype=table.dtype, device=table.device)
    if len(ids):
        _embed_kernel[(len(ids), -(-width // _BLOCK))](
            ids, table, vision, sources, out, table.stride(0), vision.stride(0), width,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out
