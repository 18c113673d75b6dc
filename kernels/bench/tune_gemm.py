"""Find the fastest launch of every four-bit GEMM on this device: `python tune_gemm.py -o DIR`.

Candidates are compiled by a pool of processes first (the compiler's disk cache hands them over),
then each is checked against the fp32 product and timed with cold weights. Writes DIR/DEVICE.json,
the table `epd_kernels` ships, and DIR/DEVICE-sweep.csv with every candidate's time.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, fields, replace
from itertools import product
from pathlib import Path

import torch
from gemm_cases import SCHEMES, SHAPES, Case, activations, checked, shape_of, weight_of
from timing import Windows, graph_timing

from epd_kernels import launch
from epd_kernels.launch import GemmConfig, read_launches, triton, tuned_name

BUCKETS = (1, 4, 16, 32, 64, 128, 256, 640)
FOLDED_FROM = 64  # tokens, below which promoting each group is the faster way
SHORT = Windows(5, 3.0)


# (rows, tokens, warps), and of those each (stages, steps of 128 inputs per trip)
FEWEST = {(64, 16, 4): ((4, 1), (5, 1), (6, 1), (3, 2), (4, 2), (5, 2)),
          (128, 16, 4): ((4, 1), (6, 1), (3, 2), (4, 2))}  # fmt: skip
UP_TO_32 = {(64, 32, 4): ((4, 1), (5, 1), (3, 2), (4, 2)),
            (128, 32, 4): ((4, 1), (5, 1), (3, 2))}  # fmt: skip
UP_TO_64 = {(64, 64, 4): ((3, 1), (4, 1), (5, 1), (2, 2), (3, 2), (4, 2)),
            (128, 64, 4): ((4, 1), (5, 1), (2, 2), (3, 2)),
            (128, 64, 8): ((4, 1), (3, 2))}  # fmt: skip
UP_TO_128 = {(64, 64, 4): ((3, 1), (4, 1), (2, 2)), (64, 128, 4): ((3, 1), (2, 2), (3, 2)),
             (128, 64, 4): ((4, 1), (2, 2), (3, 2)), (128, 128, 4): ((3, 1), (4, 1)),
             (128, 128, 8): ((4, 1), (2, 2), (3, 2))}  # fmt: skip
MORE = {(64, 128, 4): ((3, 1), (2, 2)), (128, 64, 4): ((4, 1),), (128, 128, 4): ((3, 1), (4, 1)),
        (128, 128, 8): ((3, 1), (4, 1), (2, 2))}  # fmt: skip
WIDEST = {(64, 256, 4): ((2, 1), (3, 1)), (128, 256, 8): ((2, 1), (3, 1))}


def candidates(scheme: str, m: int) -> list[GemmConfig]:
    """The launches worth trying for `m` tokens: tiles, by spans of K or with their rest cut.

    With s stages loads are s - 2 steps ahead of their use. All wait for the kernel ahead by
    themselves.
    """
    limits = ((16, FEWEST, (1, 2, 4, 6)), (32, UP_TO_32, (1, 2, 4)), (64, UP_TO_64, (1, 2, 4)),
              (128, UP_TO_128, (1, 2, 4)), (256, MORE, (1, 2)))  # fmt: skip
    tiles, spans = next(((t, s) for most, t, s in limits if m <= most), (MORE, (1,)))
    if "folded" in scheme and m > 128:
        tiles = tiles | WIDEST
    wide = "w4a16" in scheme
    found = [
        GemmConfig(rows, tokens, splits, warps, stages, early=True, unroll=steps)
        for (rows, tokens, warps), depths in tiles.items()
        if not wide or rows * tokens <= 64 * 128
        for (stages, steps), splits in product(depths, spans)
        if not wide or (stages <= 4 and steps == 1)
    ]
    if m > 64 and not wide:
        found += [
            replace(c, splits=4, cut=True) for c in found if c.splits == 1 and c.block_m == 128
        ]
    if m > 16 or wide:
        return found
    # as tiles ask for the same few activations together, some spread them over K
    found += [replace(c, turned=True) for c in found if c.splits == 1]
    one_warp = [GemmConfig(16, 8, 1, 1, ahead, early=True) for ahead in (2, 4, 8)]
    return found + one_warp if m <= 8 else found


def taken(config: GemmConfig, scheme: str, k: int) -> bool:
    """Whether a launch can multiply: one warp takes int8 alone, and whole trips."""
    return config.num_warps > 1 or ("int8" in scheme and k // 128 % config.num_stages == 0)


def fills(config: GemmConfig, m: int, n: int, sms: int) -> bool:
    """Whether the programs of a launch are neither too few for the device nor split for nothing."""
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    if config.cut:
        return tiles > sms and tiles % sms > 0
    return tiles * config.splits >= sms // 2 and (config.splits == 1 or tiles < 2 * sms)


def compile_candidates(scheme: str, k: int, buckets: list[int], share: int, shares: int) -> int:
    """Compile one share of a scheme's candidates at K = `k`; the count that compiled."""
    seen: set[GemmConfig] = set()
    weight = torch.ones(64, k, dtype=torch.bfloat16, device="cuda")
    case = Case(SCHEMES[scheme], weight, copies=1)
    codes, scales = case.quantized(torch.ones(16, k, dtype=torch.bfloat16, device="cuda"))
    for m in buckets:
        for config in candidates(scheme, m):
            variant = replace(config, splits=min(config.splits, 2))
            if variant in seen or not taken(config, scheme, k):
                continue
            seen.add(variant)
            if len(seen) % shares == share:
                try:
                    few = slice(config.block_m)
                    case.calls(codes[few], None if scales is None else scales[few], config)[0]()
                except Exception as error:
                    print(f"{scheme} K={k} {spelled(variant)}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()
    return len(seen) // shares


def compile_all(schemes: list[str], widths: set[int], buckets: list[int], workers: int) -> None:
    """Fill the compiler's disk cache with every candidate."""
    shares = max(1, workers // 4)
    jobs = list(product(schemes, sorted(widths), range(shares)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = [pool.submit(compile_candidates, s, k, buckets, i, shares) for s, k, i in jobs]
        for future in as_completed(waiting):
            future.result()


def spelled(config: GemmConfig) -> str:
    return "/".join(str(int(v or 0)) for v in astuple(config))


def _shipped(name: str) -> dict[str, dict[str, dict[str, list[object]]]]:
    """The launches in the package for this device, which new ones replace one by one."""
    path = Path(launch.__file__).with_name("tuned") / f"{name}.json"
    found = read_launches(path) if path.is_file() else {}
    return {
        scheme: {
            f"{n}x{k}": {str(m): list(astuple(config)) for m, config in launches.items()}
            for (n, k), launches in shapes.items()
        }
        for scheme, shapes in found.items()
    }


class Tuner:
    """Times candidates and keeps the winners of one device."""

    def __init__(self, directory: Path, deadline: float) -> None:
        self._deadline = deadline
        self._directory = directory
        self._name = tuned_name(torch.device("cuda"))
        self._kernels: dict[str, dict[str, dict[str, list[object]]]] = _shipped(self._name)
        self._sweep: list[list[object]] = []

    def tune(self, case: Case, m: int) -> None:
        """Try the candidates of one scheme, weight shape and token count."""
        if time.monotonic() > self._deadline:
            print(f"out of time before {case.scheme.name} {case.shape} M={m}")
            return
        codes, scales = case.quantized(activations(m, case.shape[1]))
        expected = case.expected(codes, scales)
        times: dict[GemmConfig, float] = {}
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        n, k = case.shape
        for config in candidates(case.scheme.name, m):
            if not (taken(config, case.scheme.name, k) and fills(config, m, n, sms)):
                continue
            times[config] = self._time(case, codes, scales, expected, config)
        best = sorted(times, key=times.__getitem__)[:3]
        shown = "  ".join(f"{times[c]:.1f}:{spelled(c)}" for c in best)
        print(f"{case.scheme.name} {case.shape} M={m}  {shown}", flush=True)
        if not best or math.isinf(times[best[0]]):
            return
        shapes = self._kernels.setdefault(case.scheme.name, {})
        by_tokens = shapes.setdefault("x".join(map(str, case.shape)), {})
        by_tokens[str(m)] = list(astuple(best[0]))

    def _time(
        self, case: Case, codes: torch.Tensor, scales: torch.Tensor | None,
        expected: torch.Tensor, config: GemmConfig,
    ) -> float:  # fmt: skip
        """Microseconds, infinity where the launch fails or its result is wrong."""
        calls = case.calls(codes, scales, config)
        micros = float("inf")
        try:
            found = f"{checked(calls[0], expected, f'{case.scheme.name} {config}'):.1e}"
            micros = graph_timing(calls, SHORT).p50
        except ArithmeticError as failure:
            print(failure, flush=True)
            found = "wrong"
        except (
            triton.runtime.errors.OutOfResources,
            triton.CompilationError,
            RuntimeError,
        ) as failure:
            found = type(failure).__name__
        row = [case.scheme.name, *case.shape, len(codes), *astuple(config), f"{micros:.2f}", found]
        self._sweep.append(row)
        return micros

    def write(self) -> Path:
        """The table and the sweep, as files."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{self._name}.json"
        table = {
            "device": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "fields": [f.name for f in fields(GemmConfig)],
            "gemm": self._kernels,
        }
        path.write_text(json.dumps(table, indent=1) + "\n")
        with path.with_name(f"{self._name}-sweep.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            names = [f.name for f in fields(GemmConfig)]
            writer.writerow(["scheme", "N", "K", "M", *names, "p50_us", "error"])
            writer.writerows(self._sweep)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240, help="stop timing after this")
    parser.add_argument("--compile-only", action="store_true", help="fill the compiler's cache")
    parser.add_argument("--compiled", action="store_true", help="the compiler's cache is full")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--buckets", nargs="*", type=int, default=list(BUCKETS))
    parser.add_argument("--shapes", nargs="*", type=shape_of, default=list(SHAPES))
    args = parser.parse_args()
    began = time.monotonic()
    if not args.compiled:
        compile_all(
            args.schemes, {k for _, k in args.shapes}, args.buckets, min(os.cpu_count() or 1, 16)
        )
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    if args.compile_only:
        return
    tuner = Tuner(args.output, began + args.seconds)
    try:
        for n, k in args.shapes:
            weight = weight_of(n, k)
            for scheme in args.schemes:
                case = Case(SCHEMES[scheme], weight)
                for m in args.buckets:
                    if m >= FOLDED_FROM or not case.scheme.folded:
                        tuner.tune(case, m)
    finally:
        print(f"{tuner.write()} after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
