"""Time paged attention against torch's SDPA over dense KV: `python bench_attention.py -o FILE`.

SDPA reads contiguous, unpaged keys of equal lengths, which is the easier job. `--dry-run` needs no
GPU: it runs both once on small shapes, compares them, and times nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Results, copies_beyond_l2, measure_roofs, relative_error
from torch.nn import functional

from epd_kernels import paged_attention

BLOCK = 16
TOLERANCE = 8e-3


@dataclass(frozen=True)
class Case:
    """`batch` sequences of `length` positions, the last `queries` of which are asked."""

    batch: int
    queries: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def name(self) -> str:
        return "decode" if self.queries == 1 else "prefill"

    def __str__(self) -> str:
        return (f"S={self.batch} q={self.queries} L={self.length} "
                f"H={self.heads} Hkv={self.kv_heads} D={self.dim}")  # fmt: skip

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * self.batch * self.length * self.kv_heads * self.dim

    @property
    def num_bytes(self) -> int:
        return self.kv_bytes + 2 * 2 * self.batch * self.queries * self.heads * self.dim

    @property
    def ops(self) -> float:
        """Two products, over the visible positions only."""
        visible = self.queries * (self.length - (self.queries - 1) / 2)
        return 4.0 * self.batch * self.heads * self.dim * visible


CASES = (
    *(Case(b, 1, n) for b in (1, 8, 32) for n in (512, 2048, 8192)),
    Case(8, 1, 32768),
    *(Case(1, n, n) for n in (512, 2048, 4096, 8192, 16384)),
    Case(16, 1024, 1024),
    Case(1, 512, 8192),
)
SMALL = (Case(3, 1, 40, 8, 2, 32), Case(2, 40, 40, 8, 2, 32), Case(1, 7, 50, 8, 2, 32))


class Inputs:
    """Random q, and the same keys and values dense and scattered over shuffled blocks."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        rng = torch.Generator(device).manual_seed(seed)
        make = partial(torch.randn, generator=rng, device=device, dtype=torch.bfloat16)
        per_sequence = -(-case.length // BLOCK)
        num_blocks = case.batch * per_sequence
        order = torch.randperm(num_blocks, generator=rng, device=device)
        tables = order.view(case.batch, per_sequence)
        self.q = make(case.batch * case.queries, case.heads, case.dim)
        self.caches = [make(num_blocks, BLOCK, case.kv_heads, case.dim) for _ in "kv"]
        self.k, self.v = (
            cache[tables].flatten(1, 2)[:, : case.length].transpose(1, 2).contiguous()
            for cache in self.caches
        )
        ints: dict[str, Any] = {"device": device, "dtype": torch.int32}
        self.options = {
            "block_tables": tables.int(),
            "cu_seqlens_q": torch.arange(case.batch + 1, **ints) * case.queries,
            "seq_lens": torch.full((case.batch,), case.length, **ints),
            "scale": case.dim**-0.5,
            "max_seqlen_q": case.queries,
            "max_seqlen_k": case.length,
        }
        self._case = case

    def paged(self) -> torch.Tensor:
        return paged_attention(self.q, *self.caches, **self.options)

    def sdpa(self) -> torch.Tensor:
        case = self._case
        q = self.q.view(case.batch, case.queries, case.heads, case.dim).transpose(1, 2)
        mask = None
        if 1 < case.queries < case.length:
            mask = torch.ones(case.queries, case.length, dtype=torch.bool, device=q.device)
            mask = mask.tril(case.length - case.queries)
        out = functional.scaled_dot_product_attention(
            q, self.k, self.v, attn_mask=mask, enable_gqa=True,
            is_causal=1 < case.queries == case.length,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)


def check(case: Case, inputs: Inputs) -> float:
    """The relative distance of the two results; ends the run when it is too large."""
    error = relative_error(inputs.paged(), inputs.sdpa())
    if error > TOLERANCE:
        raise SystemExit(f"paged attention is wrong at {case}: error {error:.1e}")
    return error


def dry_run() -> None:
    for case in SMALL:
        print(f"{case.name} {case}  error={check(case, Inputs(case, 'cpu', 0)):.1e}  not timed")


def measure(results: Results) -> None:
    for case in CASES:
        copies = copies_beyond_l2(case.kv_bytes) if case.queries == 1 else 1
        # long caches need no company to leave L2, and little memory is left for it
        copies = 1 if case.kv_bytes > 1 << 30 else copies
        inputs = [Inputs(case, "cuda", seed) for seed in range(copies)]
        error = check(case, inputs[0])
        counted: dict[str, Any] = {"num_bytes": case.num_bytes, "ops": case.ops, "kind": "bf16"}
        ours = results.add(
            case.name, "paged", str(case), [x.paged for x in inputs], **counted, error=error
        )
        theirs = results.add(
            case.name, "sdpa", str(case), [x.sdpa for x in inputs], **counted, error=0.0
        )
        print(f"{case.name} {case}: {theirs.p50 / ours.p50:.2f} times SDPA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results.csv"))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        dry_run()
    else:
        measure(Results(args.output, measure_roofs()))


if __name__ == "__main__":
    main()
