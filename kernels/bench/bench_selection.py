"""Time the choice of vision tokens: `python bench_selection.py -o FILE`.

Script with its defaults, both stages over all images at once, and each of its kernels alone. Three
times of the same work: on the device (a replayed CUDA graph), on the clock (launched from Python,
awaited each time), and on the clock with the torch references in place of the kernels. `--sweep`
adds launch shapes of the greedy kernel. `--dry-run` needs no GPU: it times nothing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from timing import copies_beyond_l2, environment, graph_timing

from epd_kernels.cosines import cosines
from epd_kernels.graph_score import graph_score
from epd_kernels.greedy_dpp import greedy_dpp
from epd_kernels.relevance import relevance
from epd_kernels.row_sort import sort_rows
from epd_pruning.base import VisionInputs
from epd_pruning.script import Script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FUSED = (("graph_score", "graph_score"), ("cosines", "cosines"), ("greedy_dpp", "greedy_dpp"),
         ("relevance", "relevance"), ("row_sort", "sort_rows"))  # fmt: skip
WARPS_AND_ROWS = tuple((warps, rows) for warps in (2, 4, 8, 16) for rows in (2, 4, 8, 16, 32))
AGREEMENT = 0.9


@dataclass(frozen=True)
class Case:
    """`images` of `size` tokens, `keep` of each chosen; `bar_ms` is what the whole may take."""

    name: str
    images: int
    size: int
    keep: int
    bar_ms: float | None = None
    width: int = 4096
    aligned: int = 768

    def __str__(self) -> str:
        return f"{self.name}: {self.images} x N={self.size} k={self.keep}"


CASES = (
    Case("one image", 1, 576, 64, 0.30),
    Case("32 images", 32, 576, 64, 1.5),
    Case("five crops", 5, 576, 64, 1.5),
    Case("one span", 1, 2880, 320, 1.5),
)
SMALL = (Case("one image", 1, 40, 5, width=32, aligned=16),
         Case("three images", 3, 33, 4, width=32, aligned=16))  # fmt: skip


class Work:
    """Random images of one case and everything that is timed on them."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int) -> None:
        rng = torch.Generator(device).manual_seed(seed)
        make = partial(torch.randn, generator=rng, device=device, dtype=dtype)
        self._case, self._pruner = case, Script(relevance_sign=1)
        # a common direction, as the projected tokens of a picture have
        common = make(case.images, 1, case.width)
        self.tokens = make(case.images, case.size, case.width) + common
        self.aligned = make(case.images, case.size, case.aligned)
        self.query = make(case.images, case.aligned)
        pool = self._pruner.pool_size(case.size, case.keep)
        self.pool = self.tokens[:, :pool].contiguous()
        self.pool_aligned = self.aligned[:, :pool].contiguous()
        self.similarity = cosines(self.pool, power=self._pruner.similarity_power)
        self.whole = cosines(self.tokens)
        self.r = self.relevance()
        self.ones = torch.ones(self.whole.shape[:2], device=device)

    def script(self) -> torch.Tensor:
        """The kept indices [B, k], as a server finds them."""
        pairs = zip(self.tokens, self.aligned, strict=True)
        images = [VisionInputs(embeddings=tokens, aligned=aligned) for tokens, aligned in pairs]
        counts = [self._case.keep] * len(images)
        pools = self._pruner.prepare_all(images, counts)
        queries = list(self.query[:, None])
        return torch.stack(self._pruner.select_all(pools, counts, queries=queries))

    def graph(self) -> torch.Tensor:
        return graph_score(self.tokens, quantile=0.9)

    def cosines(self) -> torch.Tensor:
        return cosines(self.pool, power=self._pruner.similarity_power)

    def relevance(self) -> torch.Tensor:
        return relevance(self.pool_aligned, self.query, sign=1, form="exp", weight=0.8)

    def greedy_pool(self) -> torch.Tensor:
        return greedy_dpp(self.similarity, self.r, self._case.keep, eps=1e-5)[0]

    def greedy_whole(self) -> torch.Tensor:
        return greedy_dpp(self.whole, self.ones, self._case.keep, eps=1e-5)[0]

    def sort(self) -> torch.Tensor:
        return sort_rows(self.ones * self.tokens[:, :, 0])[1]

    def parts(self) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            "script, both stages": self.script, "graph score": self.graph,
            "cosines of the pool": self.cosines, "relevance of the pool": self.relevance,
            "greedy DPP, pool": self.greedy_pool, "greedy DPP, whole image": self.greedy_whole,
            "sort of the scores": self.sort,
        }  # fmt: skip


@contextmanager
def torch_only() -> Iterator[None]:
    """Every kernel of the selection replaced by its torch reference."""
    modules = [(import_module(f"epd_kernels.{module}"), name) for module, name in FUSED]
    patches = [patch.object(m, f"{name}_triton", getattr(m, f"{name}_ref")) for m, name in modules]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def agreement(work: Work) -> float:
    """The share of kept tokens that kernels and references choose alike."""
    found = work.script()
    with torch_only():
        expected = work.script()
    both = zip(found.tolist(), expected.tolist(), strict=True)
    share = sum(len(set(a) & set(b)) for a, b in both) / found.numel()
    if share < AGREEMENT:
        raise SystemExit(f"the kernels choose other tokens: {share:.1%} alike")
    return share


def clock_us(call: Callable[[], object], repeats: int) -> float:
    """Median microseconds from Python until the device is done."""
    samples = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        samples.append(1e6 * (time.perf_counter() - begin))
    return statistics.median(samples[2:])


def measure(case: Case) -> list[dict[str, Any]]:
    copies = copies_beyond_l2(2 * case.images * case.size * case.width)
    works = [Work(case, "cuda", torch.bfloat16, seed) for seed in range(copies)]
    share, rows = agreement(works[0]), []
    for part, call in works[0].parts().items():
        timing = graph_timing([work.parts()[part] for work in works])
        clock = clock_us(call, 20)
        with torch_only():
            eager = clock_us(call, 3)
        bar = case.bar_ms if part.startswith("script") else None
        rows.append({
            "case": str(case), "part": part, "device_us": timing.p50, "p20_us": timing.p20,
            "p80_us": timing.p80, "clock_us": clock, "torch_us": eager, "bar_ms": bar or "",
            "alike": share,
        })  # fmt: skip
        verdict = (
            f"  bar {bar} ms: {'met' if timing.p50 <= 1000 * bar else 'MISSED'}" if bar else ""
        )
        print(f"{case!s:32} {part:24} device {timing.p50:9.1f} us  clock {clock:9.1f} us"
              f"  torch {eager:9.1f} us{verdict}", flush=True)  # fmt: skip
    return rows


def sweep(case: Case) -> None:
    """The greedy kernel on the pool under other launch shapes."""
    module = import_module("epd_kernels.greedy_dpp")
    work = Work(case, "cuda", torch.bfloat16, 0)
    size = work.similarity.shape[1]
    block, found = module.dpp_config(size)[0], []
    for warps, rows in WARPS_AND_ROWS:
        if rows * size <= 32768 * max(warps // 4, 1):
            with patch.object(module, "dpp_config", lambda _, c=(block, rows, warps): c):
                found.append((graph_timing([work.greedy_pool] * 4).p50, warps, rows))
    best = ", ".join(f"{us:.0f} us at {w} warps {r} rows" for us, w, r in sorted(found)[:4])
    print(f"{case!s:32} greedy over {size}: {best}; now {module.dpp_config(size)}", flush=True)


def dry_run() -> None:
    for case in SMALL:
        work = Work(case, "cpu", torch.float32, 0)
        print(f"{case}  {agreement(work):.0%} alike  not timed")
        for call in work.parts().values():
            call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("selection.csv"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        dry_run()
        return
    facts = environment()
    print(facts)
    rows = [facts | row for case in CASES for row in measure(case)]
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if args.sweep:
        for case in CASES:
            sweep(case)


if __name__ == "__main__":
    main()
