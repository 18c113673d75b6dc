"""Time four-bit linear layers on a CPU: `OMP_NUM_THREADS=1 python bench_cpu_linear.py -o FILE`.

Torch's packed product against the product over the dequantised weight that `QuantLinear` keeps, in
fp32 and in bf16. They take turns, each on several copies of the weight, and the fastest turn
counts, so that what else the machine does meets all alike; read the ratios. `--dry-run` runs each
once, compares them, and times nothing.
"""

from __future__ import annotations

import argparse
import csv
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from epd_kernels import QuantWeight, quantize_weight

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = ((512, 256, 64), (256, 256, 64), (1408, 256, 64), (256, 704, 64),
          (2048, 2048, 64), (2048, 2048, 128))  # fmt: skip
TOKENS = (1, 8, 16, 32, 64, 512)
SLOW = ("int4-fp32", 8)
"""Torch has no vector code for this; beyond so many tokens it is not worth the wait."""
TOLERANCE = {"fp32": 1e-5, "bf16": 8e-3}
COLUMNS = ("torch", "threads", "N", "K", "group_size", "tokens", "impl", "us", "over_dense_fp32",
           "error")  # fmt: skip
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ROUNDS = 25


def packed(weight: QuantWeight, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Torch's product over four-bit weights, whose zero is what code 8 of 0 to 15 stands for."""
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int() + 8, 1)
    zeros = torch.zeros_like(weight.scales)
    if weight.zeros is not None:
        zeros = -weight.zeros * weight.scales
    scales = torch.stack((weight.scales.t(), zeros.t()), dim=-1).to(dtype).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: product(x, data, weight.group_size, scales)


def dense(weight: QuantWeight, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product over the dequantised weight."""
    return partial(functional.linear, weight=weight.dequantize().to(dtype))


def main() -> None:
    """Write a row per shape, token count and implementation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    shapes, tokens = (((512, 256, 64),), (1, 8)) if given.dry_run else (SHAPES, TOKENS)
    rows = []
    for n, k, group_size in shapes:
        copies = 1 if given.dry_run else max(2, min(16, (1 << 25) // (4 * n * k)))
        weight = quantize_weight(torch.randn(n, k), group_size=group_size, symmetric=False)
        made = {
            f"{name}-{kind}": [make(weight, dtype) for _ in range(copies)]
            for name, make in (("dense", dense), ("int4", packed))
            for kind, dtype in _DTYPES.items()
        }
        for count in tokens:
            found = _measure(made, weight, torch.randn(count, k), timed=not given.dry_run)
            for row in found:
                rows.append({"torch": torch.__version__, "threads": torch.get_num_threads(),
                             "N": n, "K": k, "group_size": group_size, "tokens": count,
                             **row})  # fmt: skip
                print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if given.out is not None and not given.dry_run:
        with given.out.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


def _measure(
    made: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]], weight: QuantWeight,
    x: torch.Tensor, *, timed: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per implementation: time of a call, its share of the dense fp32 one's, and error."""
    wanted, rows = x.double() @ weight.dequantize().double().t(), []
    inputs = {kind: x.to(dtype) for kind, dtype in _DTYPES.items()}
    made = {k: calls for k, calls in made.items() if k != SLOW[0] or len(x) <= SLOW[1]}
    for name, calls in made.items():
        kind = name.partition("-")[2]
        error = float((calls[0](inputs[kind]).double() - wanted).norm() / wanted.norm())
        assert error < TOLERANCE[kind], f"{name} is wrong by {error}"
        rows.append({"impl": name, "us": "not timed", "error": f"{error:.2g}"})
    if not timed:
        return rows
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(_ROUNDS):
        for name, calls in made.items():
            rows_in = inputs[name.partition("-")[2]]
            start = time.perf_counter()
            for call in calls:
                call(rows_in)
            times[name].append((time.perf_counter() - start) / len(calls))
    base = min(times["dense-fp32"])
    for row in rows:
        took = min(times[row["impl"]])
        row |= {"us": f"{1e6 * took:.1f}", "over_dense_fp32": f"{took / base:.2f}"}
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
