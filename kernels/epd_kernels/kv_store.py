"""Scatter this step's keys and values into the paged KV cache.

Slot s of token t names block s // block_size and row s % block_size of it. A negative slot means
the token is padding (or its KV lives elsewhere) and nothing is written.
"""

from __future__ import annotations

import torch

from .launch import jit, next_power_of_2, row_warps, tl

__all__ = ["store_kv", "store_kv_ref"]


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:  # fmt: skip
    """Nothing; writes `k`, `v` `[T, Hkv, D]` into caches `[num_blocks, block_size, Hkv, D]`.

    `slot_mapping` is int64 `[T]`; slots that are not negative are distinct.
    """
    run = store_kv_triton if k.is_cuda else store_kv_ref
    run(k, v, k_cache, v_cache, slot_mapping)


def store_kv_ref(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:  # fmt: skip
    """`store_kv` in torch."""
    kept = slot_mapping >= 0
    if not bool(kept.all()):
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    block_size = k_cache.shape[1]
    block, row = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block, row] = k.to(k_cache.dtype)
    v_cache[block, row] = v.to(v_cache.dtype)


@jit
def _store_kv_kernel(
    k: tl.tensor, v: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, slot_mapping: tl.tensor,
    k_stride_t: tl.tensor, k_stride_h: tl.tensor, v_stride_t: tl.tensor, v_stride_h: tl.tensor,
    stride_block: tl.tensor, stride_row: tl.tensor, stride_head: tl.tensor, block_size: tl.tensor,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program, all its KV heads at once."""
    i_t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + i_t)
    if slot >= 0:
        o_h = tl.arange(0, BLOCK_H)[:, None]
        o_d = tl.arange(0, BLOCK_D)[None, :]
        mask = (o_h < HEADS) & (o_d < D)
        o_cache = (slot // block_size) * stride_block + (slot % block_size) * stride_row
        o_cache += o_h * stride_head + o_d
        b_k = tl.load(k + i_t * k_stride_t + o_h * k_stride_h + o_d, mask=mask, other=0.0)
        b_v = tl.load(v + i_t * v_stride_t + o_h * v_stride_h + o_d, mask=mask, other=0.0)
        tl.store(k_cache + o_cache, b_k.to(k_cache.dtype.element_ty), mask=mask)
        tl.store(v_cache + o_cache, b_v.to(v_cache.dtype.element_ty), mask=mask)


def store_kv_triton(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:  # fmt: skip
    """`store_kv` on the device of `k`; the caches may be views of equal strides."""
    tokens, heads, dim = k.shape
    assert k.stride(-1) == v.stride(-1) == k_cache.stride(-1) == 1
    assert k_cache.stride() == v_cache.stride() and slot_mapping.dtype == torch.int64
    if tokens:
        _store_kv_kernel[(tokens,)](
            k, v, k_cache, v_cache, slot_mapping, k.stride(0), k.stride(1), v.stride(0),
            v.stride(1), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
            k_cache.shape[1], HEADS=heads, D=dim, BLOCK_H=next_power_of_2(heads),
            BLOCK_D=next_power_of_2(dim), num_warps=row_warps(heads * dim),
        )  # fmt: skip
