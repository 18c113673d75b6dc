"""Time four-bit GEMMs against the vendor's bf16 and FP8 products: `python bench_gemm.py -o FILE`.

Activations are quantised beforehand, for the vendor's FP8 product as for ours; the sums of x that
U4 needs are inside the time. `--dry-run` needs no GPU: it runs every four-bit implementation once
on small shapes, checks it, and times nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timing import Results, copies_beyond_l2, measure_roofs, relative_error
from torch.nn import functional

from epd_kernels import (
    Format,
    pack,
    quantize_fp8,
    quantize_int8,
    quantize_weight,
    w4_gemm,
    w4a8_fp8_large,
)

TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 640, 1024, 2048, 8192)
SHAPES = ((12288, 4096), (22016, 4096), (28672, 4096), (4096, 11008), (4096, 14336))
FOUR_BIT = {
    "w4a16": (Format.U4, None, "bf16"),
    "w4a8-fp8-sm7": (Format.SM7, quantize_fp8, "fp8"),
    "w4a8-fp8-u4": (Format.U4, quantize_fp8, "fp8"),
    "w4a8-int8": (Format.HI4, quantize_int8, "int8"),
}
TOLERANCE = 8e-3


@dataclass(frozen=True)
class Variant:
    """One implementation at one shape: calls on distinct weights, bytes of one, and its error."""

    calls: Sequence[Callable[[], torch.Tensor]]
    num_bytes: int
    kind: str
    error: float


def four_bit(name: str, x: torch.Tensor, weight: torch.Tensor, group: int) -> Variant:
    """Our GEMM, checked against the fp32 product of its own dequantised operands."""
    target, quantize, kind = FOUR_BIT[name]
    codes, scales = quantize(x) if quantize else (x, None)
    canonical = quantize_weight(weight, group_size=group or weight.shape[1])
    packed = pack(canonical, target)
    zeros = 0 if packed.zeros is None else packed.zeros.nbytes
    read = packed.data.nbytes + packed.scales.nbytes + zeros
    run = partial(w4_gemm, codes, out_dtype=x.dtype, x_scales=scales)
    calls = [partial(run, deepcopy(packed)) for _ in range(copies(read, x))]
    wide = codes.float() if scales is None else codes.float() * scales[:, None]
    error = relative_error(calls[0](), wide @ canonical.dequantize().t())
    if error > TOLERANCE:
        raise SystemExit(f"{name} is wrong at {tuple(x.shape)} x {len(weight)}: error {error:.1e}")
    return Variant(calls, read + codes.nbytes + out_bytes(x, weight), kind, error)


def widened(x: torch.Tensor, weight: torch.Tensor, group: int) -> Variant:
    """The four-bit weight turned to FP8 inside the time, then the vendor's product."""
    codes, scales = quantize_fp8(x)
    packed = pack(quantize_weight(weight, group_size=group or weight.shape[1]), Format.SM7)
    run = partial(w4a8_fp8_large, codes, out_dtype=x.dtype, x_scales=scales)
    read = packed.data.nbytes + packed.scales.nbytes
    calls = [partial(run, deepcopy(packed)) for _ in range(copies(read, x))]
    error = relative_error(
        calls[0](), w4_gemm(codes, packed, out_dtype=torch.float32, x_scales=scales)
    )
    # the FP8 weight is written once and read once
    moved = read + 2 * weight.numel() + codes.nbytes + out_bytes(x, weight)
    return Variant(calls, moved, "fp8", error)


def vendor_bf16(x: torch.Tensor, weight: torch.Tensor) -> Variant:
    weights = [weight.clone() for _ in range(copies(weight.nbytes, x))]
    calls = [partial(functional.linear, x, w) for w in weights]
    error = relative_error(calls[0](), x.float() @ weight.float().t())
    return Variant(calls, weight.nbytes + x.nbytes + out_bytes(x, weight), "bf16", error)


def vendor_fp8(x: torch.Tensor, weight: torch.Tensor) -> Variant:
    """Row-wise scales on both sides; fewer than 16 tokens are padded to what it accepts."""
    x = functional.pad(x, (0, 0, 0, max(16 - len(x), 0)))
    (a, scale_a), (b, scale_b) = quantize_fp8(x), quantize_fp8(weight)
    expected = (a.float() * scale_a[:, None]) @ (b.float() * scale_b[:, None]).t()
    calls = [
        partial(torch._scaled_mm, a, b.clone().t(), scale_a[:, None], scale_b[None], None, None,
                x.dtype)
        for _ in range(copies(b.nbytes, x))
    ]  # fmt: skip
    error = relative_error(calls[0](), expected)
    return Variant(calls, b.nbytes + a.nbytes + out_bytes(x, weight), "fp8", error)


def copies(num_bytes: int, x: torch.Tensor) -> int:
    return copies_beyond_l2(num_bytes) if x.is_cuda else 1


def out_bytes(x: torch.Tensor, weight: torch.Tensor) -> int:
    return x.element_size() * len(x) * len(weight)


def operands(m: int, n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator(device).manual_seed(m)
    make = partial(torch.randn, generator=rng, device=device, dtype=torch.bfloat16)
    return make(m, k), make(n, k)


def dry_run(group: int) -> None:
    for m in (1, 17):
        x, weight = operands(m, 64, 256, "cpu")
        for name in FOUR_BIT:
            error = four_bit(name, x, weight, group).error
            print(f"{name}  M={m} N=64 K=256 g={group or 'K'}  error={error:.1e}  not timed")
        error = widened(x, weight, group).error
        print(f"w4a8-fp8-widened  M={m} N=64 K=256  error={error:.1e}  not timed")


def measure(results: Results, group: int) -> None:
    """Every shape and token count; a line per cell says how it stands to bf16."""
    for n, k in SHAPES:
        for m in TOKENS:
            x, weight = operands(m, n, k, "cuda")
            variants = {"bf16": vendor_bf16(x, weight)}
            if torch.cuda.get_device_capability() >= (9, 0):
                variants["fp8"] = vendor_fp8(x, weight)
                if m >= 256:
                    variants["w4a8-fp8-widened"] = widened(x, weight, group)
            variants |= {name: four_bit(name, x, weight, group) for name in FOUR_BIT}
            shape = f"M={m} N={n} K={k} g={group or 'K'}"
            times = {
                name: results.add(
                    "gemm", name, shape, v.calls, num_bytes=v.num_bytes, ops=2.0 * m * n * k,
                    kind=v.kind, error=v.error,
                ).p50
                for name, v in variants.items()
            }  # fmt: skip
            ratios = {name: round(times["bf16"] / t, 2) for name, t in times.items()}
            print(f"{shape}: times bf16 {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results.csv"))
    parser.add_argument("--group-size", type=int, default=128, help="0: one group per row")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        dry_run(args.group_size)
    else:
        measure(Results(args.output, measure_roofs()), args.group_size)


if __name__ == "__main__":
    main()
