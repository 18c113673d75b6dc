"""Timing inside CUDA graphs, the device's measured roofs, and the rows of a result file.

A call is timed by capturing it many times in one graph, each time on another copy of its large
inputs so that none of them waits in the L2 cache, and replaying the graph in windows of some
milliseconds. Launch overhead of Python is outside; the gap between two kernels of a graph is
inside, as it is when serving. Roofs are measured in the same process: a copy for bytes, vendor
matrix products for operations.
"""

from __future__ import annotations

import csv
import datetime
import math
import os
import statistics
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Windows:
    """How often, and for how long at a time, a graph is replayed."""

    count: int = 9
    ms: float = 50.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds per call over the windows."""

    p20: float
    p50: float
    p80: float


def graph_timing(calls: Sequence[Callable[[], object]], windows: Windows | None = None) -> Timing:
    """Time per call of `calls`, run one after another inside one captured graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    windows = windows or Windows()
    once = _replay_ms(graph, 3) / 3
    repeats = max(1, math.ceil(windows.ms / once))
    per_call = 1000 / (repeats * len(calls))
    samples = [_replay_ms(graph, repeats) * per_call for _ in range(windows.count)]
    low, *_, high = statistics.quantiles(samples, n=5)
    return Timing(low, statistics.median(samples), high)


def _replay_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def copies_beyond_l2(bytes_each: int) -> int:
    """How many copies of an input keep the next one out of the L2 cache: twice its size, or 4."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return min(max(4, math.ceil(2 * l2 / bytes_each)), 64)


@dataclass(frozen=True, slots=True)
class Roofs:
    """Measured limits: bytes per second of a copy (read and write), operations per second."""

    bytes_per_s: float
    ops_per_s: dict[str, float]

    def percent(self, micros: float, num_bytes: float, ops: float, kind: str) -> float:
        """The share of the nearer roof that a call of `micros` reached."""
        ideal = max(num_bytes / self.bytes_per_s, ops / self.ops_per_s[kind])
        return 100 * ideal / (micros * 1e-6)


def copy_roof() -> float:
    """Bytes read and written per second by the fastest copy of 1 GiB of random bytes.

    The driver's copy and an elementwise kernel are tried, in both directions between two buffers
    that share nothing; the best window counts, since a roof is what the device can do.
    """
    size = 1 << 30
    source, target = (
        torch.randint(-(1 << 31), 1 << 31, (size // 4,), dtype=torch.int32, device="cuda")
        for _ in "12"
    )
    ways = (
        [lambda: target.copy_(source), lambda: source.copy_(target)],
        [lambda: torch.bitwise_not(source, out=target),
         lambda: torch.bitwise_not(target, out=source)],
    )  # fmt: skip
    best = min(graph_timing(way * 2, Windows(9, 10.0)).p20 for way in ways)
    return 2 * size / (best * 1e-6)


def measure_roofs() -> Roofs:
    """The roofs of the current device, on random data: zeros draw less power and run faster."""
    copied = copy_roof()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "12")
    ops = {"bf16": 2 * 8192**3 / (graph_timing([lambda: a @ b] * 2).p50 * 1e-6)}
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")
        product = partial(torch._scaled_mm, a8, b8, one, one, out_dtype=torch.bfloat16)
        calls = [partial(product, use_fast_accum=True)] * 2
        ops["fp8"] = 2 * 8192**3 / (graph_timing(calls).p50 * 1e-6)
    # no vendor int8 product takes these shapes everywhere; the hardware rate equals FP8's
    ops["int8"] = ops.get("fp8", 2 * ops["bf16"])
    return Roofs(copied, ops)


@dataclass(frozen=True, slots=True)
class Row:
    """One measured cell. `error` is the relative Frobenius distance from the reference."""

    op: str
    impl: str
    shape: str
    p20_us: float
    p50_us: float
    p80_us: float
    tb_per_s: float
    tflops: float
    roof_percent: float
    error: float


def environment() -> dict[str, str]:
    """What a number depends on besides its shape."""
    import triton

    def ask(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _commit() -> str:
    """What the variable COMMIT says, where a copy of the tree is measured, or the checkout's."""
    if told := os.environ.get("COMMIT"):
        return told
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


class Results:
    """Appends rows to a CSV file and, unless quiet, prints them; each carries its environment."""

    def __init__(
        self, path: Path, roofs: Roofs, windows: Windows | None = None, *, quiet: bool = False
    ) -> None:
        self._path, self._roofs, self._windows, self._quiet = path, roofs, windows, quiet
        self._environment = environment()
        rates = ", ".join(f"{k} {v / 1e12:.0f} Tops/s" for k, v in roofs.ops_per_s.items())
        print(f"{self._environment}\nroofs: copy {roofs.bytes_per_s / 1e12:.2f} TB/s, {rates}")

    def write_roofs(self) -> None:
        """A row per roof, for who reads the file later."""
        nothing = (0.0, 0.0, 0.0)
        copied = self._roofs.bytes_per_s / 1e12
        self._write(Row("roof", "copy", "", *nothing, copied, 0.0, 100.0, 0.0))
        for kind, rate in self._roofs.ops_per_s.items():
            self._write(Row("roof", kind, "", *nothing, 0.0, rate / 1e12, 100.0, 0.0))

    def add(
        self, op: str, impl: str, shape: str, calls: Sequence[Callable[[], object]], *,
        num_bytes: float, ops: float, kind: str, error: float,
    ) -> Timing:  # fmt: skip
        """Time `calls` and write their row."""
        timing = graph_timing(calls, self._windows)
        seconds = timing.p50 * 1e-6
        row = Row(
            op, impl, shape, timing.p20, timing.p50, timing.p80, num_bytes / seconds / 1e12,
            ops / seconds / 1e12, self._roofs.percent(timing.p50, num_bytes, ops, kind), error,
        )  # fmt: skip
        self._write(row)
        return timing

    def _write(self, row: Row) -> None:
        cells: dict[str, Any] = {
            k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()
        }
        if not self._quiet:
            print("  ".join(f"{k}={cells[k]}" for k in cells), flush=True)
        fresh = not self._path.exists()
        with self._path.open("a", newline="") as file:
            names = [*self._environment, *(f.name for f in fields(Row))]
            writer = csv.DictWriter(file, names)
            if fresh:
                writer.writeheader()
            writer.writerow({**self._environment, **cells})


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())
