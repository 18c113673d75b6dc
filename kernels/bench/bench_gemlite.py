"""Time GemLite's four-bit GEMM where it ships a tuned launch: `python bench_gemlite.py -o FILE`.

GemLite is not a dependency: without it the script says so and ends. The launches are those it ships
for the H100, at the shapes it ships them for; others would be searched for at length on first use.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gemm_cases import activations, weight_of
from timing import Results, Windows, copies_beyond_l2, measure_roofs, relative_error

from epd_kernels import quantize_weight

GROUP = 128
SHAPE = (28672, 4096)
TOKENS = (1, 16, 64, 128, 256, 2048)


def layers(helper: Any, weight: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
    """(layers on distinct copies of the weight, the fp32 weight they stand for)."""
    canonical = quantize_weight(weight, group_size=GROUP)
    codes = (canonical.codes + 8).to(torch.uint8)
    scales = canonical.scales.view(-1, 1).to(torch.float16)
    build = partial(helper.A16W4_HQQ_INT(device="cuda:0", dtype=torch.float16).from_weights, codes)
    zeros = torch.full_like(scales, 8)
    copies = range(copies_beyond_l2(weight.numel() // 2))
    return [build(scales.clone(), zeros.clone()) for _ in copies], canonical.dequantize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results.csv"))
    args = parser.parse_args()
    try:
        import gemlite
        from gemlite import helper
    except ImportError as failure:
        print(f"GemLite is not here ({failure}); nothing to compare with")
        return
    gemlite.load_config(str(Path(gemlite.__file__).with_name("configs") / "h100.json"))
    results = Results(args.output, measure_roofs(), Windows(5, 10.0), quiet=True)
    n, k = SHAPE
    built, dense = layers(helper, weight_of(n, k))
    for m in TOKENS:
        x = activations(m, k).half()
        calls = [partial(layer, x) for layer in built]
        error = relative_error(calls[0](), x.float() @ dense.t())
        moved = n * k // 2 + 4 * n * k // GROUP + 2 * m * (n + k)
        time = results.add(
            "gemm", "gemlite-a16w4", f"M={m} N={n} K={k}", calls, num_bytes=moved,
            ops=2.0 * m * n * k, kind="bf16", error=error,
        )  # fmt: skip
        print(f"gemlite a16w4 {n}x{k} M={m}: {time.p50:.1f} us, error {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
