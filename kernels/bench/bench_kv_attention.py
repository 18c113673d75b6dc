"""Time attention over four- and eight-bit KV: `python bench_kv_attention.py -o FILE`.

Decoding is timed against our own bf16 kernel on the same blocks, prefill over plain KV against
torch's flash attention on dense keys, and over codes as the engine does it, by the kernel that
reads codes in every tile (`-tiles`), and with scores from the FP8 unit (`fp8-qk`). Every result is
checked against its reference first. Codes lie head by head, as the engine lays them. `--tune` times
the launch configurations instead, `--dry-run` needs no GPU and times nothing.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_attention import Case, Inputs
from timing import Results, Windows, copies_beyond_l2, graph_timing, measure_roofs, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from epd_kernels import KVFormat, QuantKV, dequantize_kv, paged_attention, quantize_kv
from epd_kernels.fp8_scores import FP8_QUERIES, attend_fp8_scores, rounded_queries
from epd_kernels.launch import AttentionConfig
from epd_kernels.paged_attention import paged_attention_triton
from epd_kernels.quantized_attention import (
    CodedConfig,
    quantized_attention,
    quantized_attention_triton,
)
from epd_kernels.warp_decode import WarpConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DECODE = (*(Case(b, 1, n) for b in (1, 8, 32) for n in (512, 2048, 8192)),
          Case(1, 1, 32768), Case(8, 1, 32768))  # fmt: skip
PREFILL = (*(Case(1, n, n) for n in (2048, 4096, 8192, 16384)),
           *(Case(1, n, 8192) for n in (32, 64, 128, 512)))  # fmt: skip
SMALL = (Case(3, 1, 40, 8, 2, 32), Case(2, 40, 40, 8, 2, 32), Case(1, 7, 50, 8, 2, 32))
TUNED = (Case(8, 1, 32768), Case(8, 1, 2048), Case(1, 1, 8192))
TOLERANCE = 8e-3
DECODERS = (
    *(WarpConfig(groups, occupancy, registers) for groups in (1, 2, 4)
      for occupancy, registers in ((16, 128), (12, 168))),
    CodedConfig(16, 32, 1, 3, 9), CodedConfig(16, 32, 1, 2, 10), CodedConfig(16, 32, 1, 3, 12, 168),
    CodedConfig(16, 64, 2, 3, 6, 168), CodedConfig(16, 128, 4, 3, 3, 168),
    CodedConfig(16, 128, 4, 3), CodedConfig(16, 256, 4, 2),
)  # fmt: skip
PREFILLERS = tuple(
    itertools.product(((64, 4), (128, 4), (128, 8)), (64, 128), (2, 3))
)  # rows and warps, positions, stages


class CodedInputs(Inputs):
    """`Inputs` with the same KV in codes; `rows_first` tells the order of its memory."""

    def __init__(self, case: Case, device: str, seed: int, *, rows_first: bool = False) -> None:
        super().__init__(case, device, seed)
        self._case = case
        self.coded = {
            target: [_arranged(quantize_kv(c, target), rows_first) for c in self.caches]
            for target in KVFormat
        }

    def attend(self, target: KVFormat) -> torch.Tensor:
        return quantized_attention(self.q, *self.coded[target], **self.options)

    def fp8_scores(self) -> torch.Tensor:
        return quantized_attention(
            self.q, *self.coded[KVFormat.FP8], **self.options, fp8_scores=True
        )

    def widened(self, target: KVFormat, *, rounded: bool = False) -> torch.Tensor:
        """What the codes mean, through the bf16 kernel; with queries as e4m3 rounds them."""
        caches = [dequantize_kv(cache).to(self.q.dtype) for cache in self.coded[target]]
        q = rounded_queries(self.q).to(self.q.dtype) if rounded else self.q
        return paged_attention(q, *caches, **self.options)

    def flash(self) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.sdpa()

    def coded_bytes(self, target: KVFormat) -> float:
        """Codes and scales of every position, queries and outputs."""
        case = self._case
        per_token = case.kv_heads * (target.width(case.dim) + 4)
        plain = 2 * 2 * case.batch * case.queries * case.heads * case.dim
        return 2 * case.batch * case.length * per_token + plain


def _arranged(cache: QuantKV, rows_first: bool) -> QuantKV:
    if rows_first:
        return cache
    return QuantKV(*(part.transpose(1, 2).contiguous().transpose(1, 2) for part in cache))


def check(
    case: Case, inputs: CodedInputs, target: KVFormat, out: torch.Tensor, *, rounded: bool = False
) -> float:
    """Relative distance from the bf16 kernel on widened KV; ends the run when it is too large."""
    error = relative_error(out, inputs.widened(target, rounded=rounded))
    if error > TOLERANCE:
        raise SystemExit(f"{target.value} attention is wrong at {case}: error {error:.1e}")
    return error


def dry_run() -> None:
    for case in SMALL:
        for target, rows_first in itertools.product(KVFormat, (True, False)):
            inputs = CodedInputs(case, "cpu", 0, rows_first=rows_first)
            error = check(case, inputs, target, inputs.attend(target))
            print(f"{case.name} {target.value} {case}  error={error:.1e}  not timed")


def make_inputs(case: Case, *, rows_first: bool = False) -> list[CodedInputs]:
    """Enough copies that the next one's codes are never in the L2 cache."""
    # fp32 temporaries of quantising a long cache leave no room for many copies
    copies = copies_beyond_l2(case.kv_bytes // 4) if case.queries == 1 else 1
    copies = min(copies, max(1, (8 << 30) // case.kv_bytes))
    return [CodedInputs(case, "cuda", seed, rows_first=rows_first) for seed in range(copies)]


def measure(results: Results) -> None:
    lines = []
    for case in (*DECODE, *PREFILL):
        inputs = make_inputs(case)
        add = partial(results.add, f"kv-{case.name}", shape=str(case), ops=case.ops, kind="bf16")
        plain = add("bf16", calls=[x.paged for x in inputs], num_bytes=case.num_bytes,
                    error=relative_error(inputs[0].paged(), inputs[0].sdpa()))  # fmt: skip
        times = {}
        for target in KVFormat:
            ways = {target.value: [partial(x.attend, target) for x in inputs]}
            if case.queries > 1:
                ways[f"{target.value}-tiles"] = [partial(_coded, x, None, target) for x in inputs]
            if case.queries >= FP8_QUERIES and target is KVFormat.FP8:
                ways["fp8-qk"] = [x.fp8_scores for x in inputs]
            for impl, calls in ways.items():
                error = check(case, inputs[0], target, calls[0](), rounded=impl == "fp8-qk")
                size = inputs[0].coded_bytes(target)
                times[impl] = add(impl, calls=calls, num_bytes=size, error=error).p50
        if case.queries == case.length:
            times["flash"] = add("sdpa-flash", calls=[x.flash for x in inputs],
                                 num_bytes=case.num_bytes, error=0.0).p50  # fmt: skip
        cells = "".join(f"  {k} {v:9.1f} us ({plain.p50 / v:.2f}x)" for k, v in times.items())
        lines.append(f"{case!s:44} bf16 {plain.p50:9.1f} us{cells}")
        print(lines[-1], flush=True)
        del inputs
    print(
        "\nmicroseconds, and bf16's time over each: above 1.00x it is faster than our bf16 kernel"
    )
    print("\n".join(lines))


def tune(path: Path) -> None:
    """Times of the configurations, fastest first per shape."""
    rows: list[dict[str, Any]] = []
    for case, rows_first in itertools.product(TUNED, (True, False)):
        inputs = make_inputs(case, rows_first=rows_first)
        order = "rows first" if rows_first else "heads first"
        for target, coded in itertools.product(KVFormat, DECODERS):
            if target is KVFormat.INT4 or isinstance(coded, CodedConfig):
                calls = [partial(_coded, x, coded, target) for x in inputs]
                rows.append(_row(case, f"{target.value} {order}", coded, calls))
        for n, warps, stages in itertools.product((64, 128), (4, 8), (2, 3) if rows_first else ()):
            plain = AttentionConfig(16, n, warps, stages)
            rows.append(_row(case, "bf16", plain, [partial(_plain, x, plain) for x in inputs]))
        del inputs
    for case in (Case(1, 4096, 4096), Case(1, 16384, 16384)):
        inputs = make_inputs(case)
        for (m, warps), n, stages in PREFILLERS:
            plain, coded = AttentionConfig(m, n, warps, stages), CodedConfig(m, n, warps, stages)
            rows.append(_row(case, "bf16", plain, [partial(_plain, x, plain) for x in inputs]))
            rows.append(_row(case, "int4", coded, [partial(_coded, x, coded) for x in inputs]))
            rows.append(_row(case, "fp8-qk", plain, [partial(_scores, x, plain) for x in inputs]))
        rows.append(_row(case, "sdpa-flash", None, [x.flash for x in inputs]))
        rows.append(_row(case, "sdpa", None, [x.sdpa for x in inputs]))
        del inputs
    rows.sort(key=lambda row: (row["case"], row["impl"], row["us"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for _, group in itertools.groupby(rows, key=lambda row: (row["case"], row["impl"])):
        for row in itertools.islice(group, 4):
            print(row)


def _row(
    case: Case, impl: str, config: object, calls: Sequence[Callable[[], object]]
) -> dict[str, Any]:
    """Microseconds; infinite where a configuration asks for more than the device has."""
    try:
        micros = round(graph_timing(calls, Windows(count=3, ms=10)).p50, 2)
    except Exception as error:  # Triton raises its own types for shared memory and registers
        print(f"skipped {config}: {type(error).__name__}")
        micros = float("inf")
    return {"case": str(case), "impl": impl, "us": micros, "config": str(config)}


def _coded(
    inputs: CodedInputs, config: CodedConfig | WarpConfig | None, target: KVFormat = KVFormat.INT4
) -> torch.Tensor:
    return quantized_attention_triton(
        inputs.q, *inputs.coded[target], **inputs.options, config=config
    )


def _scores(inputs: CodedInputs, config: AttentionConfig) -> torch.Tensor:
    return attend_fp8_scores(inputs.q, *inputs.coded[KVFormat.FP8], **inputs.options, config=config)


def _plain(inputs: Inputs, config: AttentionConfig) -> torch.Tensor:
    return paged_attention_triton(inputs.q, *inputs.caches, **inputs.options, config=config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results.csv"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        dry_run()
    elif args.tune:
        tune(args.output)
    else:
        measure(Results(args.output, measure_roofs()))


if __name__ == "__main__":
    main()
