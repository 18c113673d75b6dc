"""Time how fast tiles can be read by programs that do not multiply: `python read_floor.py`.

A four-bit GEMM of few tokens cannot be faster than its loop with the products taken out. Prints
microseconds with cold weights: weights and scales alone, then with the activations of 16 tokens,
which every program reads again, then the product itself at the same launch.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from gemm_cases import SCHEMES, SHAPES, Case, activations, shape_of, weight_of
from timing import Windows, graph_timing

from epd_kernels.launch import GemmConfig, jit, tl

TOKENS = 16
LAUNCHES = tuple(
    GemmConfig(rows, TOKENS, 1, 4, stages) for rows, stages in ((64, 4), (64, 6), (128, 6))
)


@jit
def _read_kernel(
    x: tl.tensor, data: tl.tensor, scales: tl.tensor, out: tl.tensor, N: tl.tensor,
    K: tl.constexpr, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
) -> None:  # fmt: skip
    """What a tile of the GEMM loads, folded into one number per row so that nothing is skipped."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, 64)
    p_data = data + (o_n // 64).to(tl.int64)[:, None] * (32 * K) + (o_n % 64)[:, None] * 64
    p_x = x + tl.arange(0, TOKENS)[None, :] * K + tl.arange(0, 128)[:, None]
    b_seen = tl.zeros((BLOCK_N, 64), tl.uint8)
    b_inputs = tl.zeros((128, TOKENS), tl.uint8)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    for i in tl.range(0, K // 128, num_stages=STAGES):
        b_seen ^= tl.load(p_data + i * 4096 + o_j[None, :])
        b_sum += tl.load(scales + i * N + o_n)
        if ACTIVATIONS:
            b_inputs ^= tl.load(p_x + i * 128)
    b_sum += tl.sum(b_seen.to(tl.int32), axis=1).to(tl.float32)
    b_sum += tl.sum(tl.sum(b_inputs.to(tl.int32), axis=1), axis=0).to(tl.float32)
    tl.store(out + o_n, b_sum)


def reads(case: Case, codes: torch.Tensor, config: GemmConfig, *, inputs: bool) -> float:
    """Microseconds of the loads alone."""
    n, k = case.shape
    out = torch.empty(n, device="cuda")
    calls = [
        partial(
            _read_kernel[(n // config.block_n,)], codes.view(torch.uint8), packed.data,
            packed.scales, out, n, K=k, BLOCK_N=config.block_n, TOKENS=TOKENS,
            STAGES=config.num_stages, ACTIVATIONS=inputs, num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        for packed in case.copies
    ]  # fmt: skip
    return graph_timing(calls, Windows(5, 5.0)).p50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", type=shape_of, default=list(SHAPES[:2]))
    args = parser.parse_args()
    for n, k in args.shapes:
        case = Case(SCHEMES["w4a8-fp8-tiled"], weight_of(n, k))
        codes, scales = case.quantized(activations(TOKENS, k))
        for config in LAUNCHES:
            weights, both = (reads(case, codes, config, inputs=i) for i in (False, True))
            product = graph_timing(case.calls(codes, scales, config), Windows(5, 5.0)).p50
            print(f"{n}x{k}, tiles of {config.block_n} rows, {config.num_stages} stages: weights "
                  f"{weights:.1f}, and activations {both:.1f}, and products {product:.1f} us",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
