"""Time four-bit GEMMs against the vendor's bf16 and FP8 products: `python bench_gemm.py -o FILE`.

Activations are quantised beforehand, for the vendor's FP8 product as for ours; the sums of x that
U4 needs are inside the time. `--table` takes launches from a file that tune_gemm.py wrote instead
of those shipped. `--dry-run` needs no GPU: it runs every four-bit implementation once on small
shapes, checks it, and times nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gemm_cases import SCHEMES, SHAPES, TOKENS, Case, activations, checked, shape_of, weight_of
from timing import Results, Windows, copies_beyond_l2, measure_roofs, relative_error
from torch.nn import functional

from epd_kernels import dequantize_fp8, quantize_fp8, w4a8_fp8_large
from epd_kernels.launch import GemmConfig, read_launches
from epd_kernels.w4_dequant import fp8_row_scales
from epd_kernels.w4_widen import w4a16_large

FOLDED_FROM, FOLDED_TO = 64, 640  # tokens between which folded scales may be the faster ones
WIDENED_FROM = 128  # tokens, below which widening the weight first is not worth a measurement


@dataclass(frozen=True)
class Variant:
    """One implementation at one shape: calls on distinct weights, bytes of one, and its error."""

    calls: Sequence[Callable[[], object]]
    num_bytes: int
    kind: str
    error: float


def four_bit(case: Case, x: torch.Tensor, config: GemmConfig | None) -> Variant:
    """Our GEMM, checked against the fp32 product of its own dequantised operands."""
    codes, scales = case.quantized(x)
    calls = case.calls(codes, scales, config)
    error = checked(calls[0], case.expected(codes, scales), f"{case.scheme.name} M={len(x)}")
    return Variant(calls, case.num_bytes(codes), case.scheme.kind, error)


def widened(case: Case, x: torch.Tensor) -> Variant:
    """The four-bit weight turned to FP8 inside the time, then the vendor's product."""
    codes, scales = quantize_fp8(x)
    run = partial(w4a8_fp8_large, codes, out_dtype=x.dtype, x_scales=scales,
                  row_scales=fp8_row_scales(case.packed))  # fmt: skip
    error = relative_error(run(case.packed), case.expected(codes, scales))
    # the FP8 weight is written once and read once
    moved = case.num_bytes(codes) + 2 * case.shape[0] * case.shape[1]
    return Variant([partial(run, packed) for packed in case.copies], moved, "fp8", error)


def widened_16(case: Case, x: torch.Tensor) -> Variant:
    """The same in 16 bits."""
    error = relative_error(w4a16_large(x, case.packed), case.expected(x, None))
    moved = case.num_bytes(x) + 4 * case.shape[0] * case.shape[1]
    return Variant([partial(w4a16_large, x, packed) for packed in case.copies], moved, "bf16",
                   error)  # fmt: skip


def widening(case: Case) -> Variant:
    """Only the conversion to FP8."""
    run = partial(dequantize_fp8, row_scales=fp8_row_scales(case.packed))
    codes, scales = run(case.packed)
    error = relative_error(codes.float() * scales[:, None], case.dense)
    moved = case.weight_bytes + case.shape[0] * case.shape[1]
    return Variant([partial(run, packed) for packed in case.copies], moved, "fp8", error)


def vendor_bf16(x: torch.Tensor, weight: torch.Tensor) -> Variant:
    weights = [weight.clone() for _ in range(copies_beyond_l2(weight.nbytes))]
    calls = [partial(functional.linear, x, w) for w in weights]
    error = relative_error(calls[0](), x.float() @ weight.float().t())
    return Variant(calls, weight.nbytes + x.nbytes + 2 * len(x) * len(weight), "bf16", error)


def vendor_fp8(x: torch.Tensor, weight: torch.Tensor, *, fast: bool) -> Variant:
    """Row-wise scales on both sides; fewer than 16 tokens are padded to what it accepts.

    `fast`: sums stay in the tensor core's short accumulator.
    """
    x = functional.pad(x, (0, 0, 0, max(16 - len(x), 0)))
    (a, scale_a), (b, scale_b) = quantize_fp8(x), quantize_fp8(weight)
    expected = (a.float() * scale_a[:, None]) @ (b.float() * scale_b[:, None]).t()
    calls = [
        partial(torch._scaled_mm, a, b.clone().t(), scale_a[:, None], scale_b[None], None, None,
                x.dtype, use_fast_accum=fast)
        for _ in range(copies_beyond_l2(b.nbytes))
    ]  # fmt: skip
    error = relative_error(calls[0](), expected)
    return Variant(calls, b.nbytes + a.nbytes + 2 * len(x) * len(weight), "fp8", error)


class Table:
    """Launches by scheme, shape and token count, as tune_gemm.py wrote them."""

    def __init__(self, path: Path | None) -> None:
        self._shapes = read_launches(path) if path else {}

    def config(self, case: Case, m: int) -> GemmConfig | None:
        """The launch of the least tuned token count that is at least `m`, or of the greatest."""
        n, k = case.shape
        launches = self._shapes.get(case.scheme.name, {}).get((n, k))
        if not launches:
            return None
        return launches[min((b for b in launches if b >= m), default=max(launches))]


def dry_run() -> None:
    for m in (1, 17):
        x, weight = activations(m, 256, "cpu"), weight_of(64, 256, "cpu")
        for scheme in SCHEMES.values():
            codes, scales = (case := Case(scheme, weight)).quantized(x)
            (run,) = case.calls(codes, scales, None)
            error = checked(run, case.expected(codes, scales), scheme.name)
            print(f"{scheme.name}  M={m} N=64 K=256  error={error:.1e}  not timed")
        error = widened(Case(SCHEMES["w4a8-fp8"], weight), x).error
        print(f"w4a8-fp8-widened  M={m} N=64 K=256  error={error:.1e}  not timed")
        error = widened_16(Case(SCHEMES["w4a16"], weight), x).error
        print(f"w4a16-widened  M={m} N=64 K=256  error={error:.1e}  not timed")


def measure(
    results: Results, table: Table, deadline: float, *, shapes: Sequence[tuple[int, int]],
    schemes: list[str], tokens: list[int],
) -> None:  # fmt: skip
    """Every shape and token count; a line per cell says how it stands to bf16."""
    lines = []
    for n, k in shapes:
        weight = weight_of(n, k)
        cases = {name: Case(SCHEMES[name], weight) for name in schemes}
        wide = Case(SCHEMES["w4a8-fp8-tiled"], weight)
        spent = add(results, "widening", f"N={n} K={k}", widening(wide), 0.0)
        lines.append(f"{n}x{k}: widening {spent:.1f}")
        for m in tokens:
            if time.monotonic() > deadline:
                print(f"out of time before N={n} K={k} M={m}")
                continue
            x = activations(m, k)
            variants = {
                "bf16": vendor_bf16(x, weight),
                "fp8": vendor_fp8(x, weight, fast=False),
                "fp8-fast": vendor_fp8(x, weight, fast=True),
            }
            if m >= WIDENED_FROM:
                variants["w4a8-fp8-widened"] = widened(wide, x)
                if "w4a16" in cases:
                    variants["w4a16-widened"] = widened_16(cases["w4a16"], x)
            for name, case in cases.items():
                if m > 2048 and "w4a8-int8-channel" not in name:
                    continue
                if case.scheme.folded and not FOLDED_FROM <= m <= FOLDED_TO:
                    continue
                try:
                    variants[name] = four_bit(case, x, table.config(case, m))
                except ArithmeticError as failure:
                    lines.append(f"{n}x{k} M={m}: {failure}")
            ops = 2.0 * m * n * k
            times = {i: add(results, i, f"M={m} N={n} K={k}", v, ops) for i, v in variants.items()}
            cells = (f"{i} {t:.1f} ({times['bf16'] / t:.2f}x)" for i, t in times.items())
            lines.append(f"{n}x{k} M={m}: " + "  ".join(cells))
    print("\n".join(["microseconds (times bf16)", *lines]))


def add(results: Results, impl: str, shape: str, variant: Variant, ops: float) -> float:
    return results.add(
        "gemm", impl, shape, variant.calls, num_bytes=variant.num_bytes, ops=ops,
        kind=variant.kind, error=variant.error,
    ).p50  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results.csv"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="start nothing after this")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--shapes", nargs="*", type=shape_of, default=list(SHAPES))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        dry_run()
    else:
        deadline = time.monotonic() + args.seconds
        results = Results(args.output, measure_roofs(), Windows(5, 10.0), quiet=True)
        results.write_roofs()
        measure(results, Table(args.table), deadline, shapes=args.shapes, schemes=args.schemes,
                tokens=args.tokens)  # fmt: skip


if __name__ == "__main__":
    main()
