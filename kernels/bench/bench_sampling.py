"""Time the draw of the next tokens: `python bench_sampling.py -o FILE`.

`draw_tokens` against its reference, which sorts, on rows of logits that are not in the L2 cache:
on the device (a replayed CUDA graph), and what the host spends on launching one call. Peaked rows
have a few tokens far ahead, as a model gives them; in flat rows almost every token is drawn now and
then, which the kernels like least. `--dry-run` needs no GPU: it times nothing.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timing import Windows, copies_beyond_l2, environment, graph_timing

from epd_kernels.sampling import draw_tokens, draw_tokens_ref

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROWS = (1, 8, 32, 128)
VOCABULARIES = (32_064, 128_256, 151_936)


@dataclass(frozen=True)
class Case:
    """Rows of one shape and what they are drawn with, at temperature 1."""

    shape: str
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __str__(self) -> str:
        filters = f"top-k {self.top_k}, top-p {self.top_p}, min-p {self.min_p}"
        return f"{self.shape}, {filters}"

    def logits(self, rows: int, vocab: int, rng: torch.Generator) -> torch.Tensor:
        """fp32 [rows, vocab]."""
        noise = torch.randn(rows, vocab, generator=rng, device=rng.device)
        if self.shape == "flat":
            return noise
        noise[:, :: vocab // 40] += 8
        return noise.mul_(2)

    def parameters(self, rows: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
        """The parameters of `draw_tokens` but the logits."""
        full = partial(torch.full, (rows,), dtype=torch.float64, device=rng.device)
        points = torch.rand(rows, generator=rng, device=rng.device, dtype=torch.float64)
        return {"temperature": full(1.0), "top_k": full(self.top_k), "top_p": full(self.top_p),
                "min_p": full(self.min_p), "points": points}  # fmt: skip


CASES = (Case("peaked"), Case("peaked", top_k=50, top_p=0.95), Case("flat", top_p=0.9))


def agreement(case: Case, rows: int, vocab: int, rng: torch.Generator) -> float:
    """The share of rows that both ways draw alike; another token is one beside a boundary."""
    logits, told = case.logits(rows, vocab, rng), case.parameters(rows, rng)
    same = draw_tokens(logits, **told) == draw_tokens_ref(logits, **told)
    return float(same.float().mean())


def host_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds on the clock to launch one of `calls`."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / len(calls) * 1e6


def measure(case: Case, rows: int, vocab: int) -> dict[str, Any]:
    rng = torch.Generator("cuda").manual_seed(0)
    told = case.parameters(rows, rng)
    copies = copies_beyond_l2(rows * vocab * 4)
    inputs = [case.logits(rows, vocab, rng) for _ in range(copies)]
    found: dict[str, Any] = {"case": str(case), "rows": rows, "vocab": vocab}
    found["alike"] = agreement(case, rows, vocab, rng)
    for name, run in (("kernel", draw_tokens), ("sort", draw_tokens_ref)):
        calls = [partial(run, logits, **told) for logits in inputs]
        timing = graph_timing(calls, Windows(5, 8.0))
        found[f"{name}_host_us"] = round(host_us(calls), 1)
        for quantile in ("p20", "p50", "p80"):
            found[f"{name}_{quantile}_us"] = round(getattr(timing, quantile), 2)
    print("  ".join(f"{k}={v}" for k, v in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("sampling.csv"))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        for case in CASES:
            share = agreement(case, 5, 200, torch.Generator().manual_seed(0))
            print(f"{case}  {share:.0%} alike  not timed")
        return
    facts = environment()
    print(facts)
    found = [facts | measure(*cell) for cell in product(CASES, ROWS, VOCABULARIES)]
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
