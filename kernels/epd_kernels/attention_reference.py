"""`paged_attention` in torch: the definition, and the path of a CPU."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["paged_attention_ref"]


def paged_attention_ref(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *,
    block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
    scale: float, max_seqlen_q: int, max_seqlen_k: int, limits: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`paged_attention` in torch: one padded SDPA for a decode batch, else one per sequence."""
    if max_seqlen_q == 1 and len(q) == len(seq_lens):
        visible = seq_lens if limits is None else torch.minimum(seq_lens, limits).clamp(min=0)
        return _decode_ref(q, k_cache, v_cache, block_tables, visible, scale)
    out = torch.zeros_like(q)
    bounds, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    for s, length in enumerate(lengths):
        start, end = bounds[s], bounds[s + 1]
        if length and end > start:
            k, v = (_gather(cache, block_tables[s], length) for cache in (k_cache, v_cache))
            if limits is None:
                out[start:end] = _prefill_ref(q[start:end], k, v, scale)
            else:
                out[start:end] = _limited_ref(q[start:end], k, v, scale, limits[start:end])
    return out


def _gather(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """`[length, Hkv, D]`: the rows of one sequence in order."""
    num_blocks = -(-length // cache.shape[1])
    return cache[table[:num_blocks].long()].flatten(0, 1)[:length]


def _prefill_ref(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence: `q [q_len, H, D]` over `k`, `v` `[seq_len, Hkv, D]`, batched by KV head."""
    q_len, kv_heads = len(q), k.shape[1]
    group = q.shape[1] // kv_heads
    hidden = max(q_len - len(k), 0)  # queries before position 0 see nothing
    grouped = q.reshape(q_len, kv_heads, group, -1).permute(1, 2, 0, 3)[:, :, hidden:]
    k = k.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    v = v.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    rows = q_len - hidden
    mask = None
    if 1 < rows < k.shape[2]:
        mask = torch.ones(rows, k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[2] - rows)
    out = functional.scaled_dot_product_attention(
        grouped, k, v, attn_mask=mask, is_causal=rows == k.shape[2], scale=scale
    )
    out = functional.pad(out, (0, 0, hidden, 0))
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _limited_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, limits: torch.Tensor
) -> torch.Tensor:
    """One sequence whose row i sees the positions below `limits[i]`."""
    seen = torch.arange(len(k), device=q.device) < limits[:, None]
    heads_first = [t.transpose(0, 1)[None] for t in (q, k, v)]
    out = functional.scaled_dot_product_attention(
        heads_first[0], heads_first[1], heads_first[2], attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).masked_fill(~seen.any(dim=1)[:, None, None], 0)


def _decode_ref(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_tables: torch.Tensor,
    seq_lens: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """One query per sequence: the head group plays the part of the query axis."""
    num_seqs, block_size, kv_heads = len(q), k_cache.shape[1], k_cache.shape[2]
    num_blocks = -(-int(seq_lens.max()) // block_size) if num_seqs else 0
    if not num_blocks:
        return torch.zeros_like(q)
    position = torch.arange(num_blocks * block_size, device=q.device)
    seen = position < seq_lens[:, None]
    table = block_tables[:, :num_blocks].long() * seen[:, ::block_size]
    # rows past a sequence's length may hold anything, NaN included: few, so cheaper than a mask
    unseen = (~seen).flatten().nonzero().flatten()
    padded = (num_seqs, -1, kv_heads, q.shape[-1])
    k = k_cache[table].flatten(0, 2).index_fill_(0, unseen, 0).view(padded).transpose(1, 2)
    v = v_cache[table].flatten(0, 2).index_fill_(0, unseen, 0).view(padded).transpose(1, 2)
    grouped = q.reshape(num_seqs, kv_heads, -1, q.shape[-1])
    out = functional.scaled_dot_product_attention(
        grouped, k, v, attn_mask=seen[:, None, None], scale=scale
    )
    return out.flatten(1, 2).masked_fill_((seq_lens == 0)[:, None, None], 0)
