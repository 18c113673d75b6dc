"""Paged batches of coded keys and values, and what attention over them is by definition."""

from __future__ import annotations

import math
from itertools import accumulate

import torch

from epd_kernels import KVFormat, QuantKV, dequantize_kv, quantize_kv

Lengths = tuple[tuple[int, int], ...]


def poisoned_cache(target: KVFormat, *shape: int) -> QuantKV:
    """`[num_blocks, block_size, Hkv, D]` of NaN scales and codes that no store leaves."""
    codes = torch.full((*shape[:-1], target.width(shape[-1])), 0x7F, dtype=torch.uint8)
    return QuantKV(codes.view(target.dtype), torch.full(shape[:-1], math.nan))


class CodedBatch:
    """A coded paged batch whose unused slots and unused table entries would be noticed if read."""

    def __init__(
        self, target: KVFormat, dtype: torch.dtype, device: str, seqs: Lengths, *,
        heads: int = 4, kv_heads: int = 2, dim: int = 32, block: int = 16, seed: int = 0,
        sizes: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        blocks_of = [-(-n // block) for _, n in seqs]
        num_blocks = sum(blocks_of) + 3
        caches = [poisoned_cache(target, num_blocks, block, kv_heads, dim) for _ in "kv"]
        # the last block is never mapped: table entries past a sequence lead there
        order = torch.randperm(num_blocks - 1, generator=rng).tolist()
        tables = torch.full((len(seqs), max(blocks_of) + 2), num_blocks - 1)
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        for s, (_, n) in enumerate(seqs):
            mine = [order.pop() for _ in range(blocks_of[s])]
            tables[s, : len(mine)] = torch.tensor(mine, dtype=torch.int64)
            for cache, kept, size in zip(caches, (self.k, self.v), sizes[1:], strict=True):
                # channels of unlike size and offset, as keys have them
                rows = torch.randn(n, kv_heads, dim, generator=rng) * size
                rows = rows * torch.linspace(0.5, 1.5, dim) + torch.linspace(-1, 1, dim) * size
                coded = quantize_kv(rows, target)
                kept.append(dequantize_kv(coded))
                for place in range(n):
                    at = mine[place // block], place % block
                    for part, source in zip(cache, coded, strict=True):
                        _bytes(part)[at] = _bytes(source)[place]
        self.bounds = [0, *accumulate(q for q, _ in seqs)]
        q = torch.randn(self.bounds[-1], heads, dim, generator=rng) * sizes[0]
        self.q = q.to(dtype)
        self.args = (
            self.q.to(device), *(QuantKV(*(part.to(device) for part in c)) for c in caches)
        )  # fmt: skip
        self.scale = dim**-0.5
        self.options = {
            "block_tables": tables.int().to(device),
            "cu_seqlens_q": torch.tensor(self.bounds, dtype=torch.int32, device=device),
            "seq_lens": torch.tensor([n for _, n in seqs], dtype=torch.int32, device=device),
            "scale": self.scale,
            "max_seqlen_q": max(q for q, _ in seqs),
            "max_seqlen_k": max(n for _, n in seqs),
        }


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint8)


def dense(batch: CodedBatch, limits: torch.Tensor | None = None) -> torch.Tensor:
    """The definition: softmax over the visible prefix of each query, in fp64."""
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    heads = batch.q.shape[1]
    for s, (k, v) in enumerate(zip(batch.k, batch.v, strict=True)):
        first, last = batch.bounds[s], batch.bounds[s + 1]
        k, v = (t.double().repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
        for row in range(first, last):
            visible = max(len(k) - (last - first) + (row - first) + 1, 0)
            if limits is not None:
                visible = min(max(int(limits[row]), 0), len(k))
            if visible:
                scores = torch.einsum("hd,nhd->hn", batch.q[row].double(), k[:visible])
                weights = (scores * batch.scale).softmax(-1)
                out[row] = torch.einsum("hn,nhd->hd", weights, v[:visible])
    return out
