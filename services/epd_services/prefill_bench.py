"""The prefill benchmark: dense and pruned prompts through one engine, random weights.

    python -m epd_services.prefill_bench docs/bench/configs/llava-1.5-7b --out prefill.csv

A LLaVA-NeXT prompt is five crops of a picture, which are pruned one by one; here they are five
images of a prompt, without the row ends that LLaVA-NeXT always keeps. Times are wall clock with the
device synchronised at both ends: vision tokens on the device in, first token on the host out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epd.errors import EPDError
from epd_services.bench_rows import Row, machine, markdown, write_csv
from epd_services.offline_bench import device_and_dtype
from epd_services.progress import progress

if TYPE_CHECKING:
    from epd_services.prefill_pipeline import Prefill, PrefillPipeline

__all__ = ["CASES", "Case", "main", "run_prefill_bench"]

_COLUMNS = {
    "case": "case", "method": "method", "batch": "batch", "tokens": "tokens", "prefill": "ms",
    "low": "fastest", "high": "slowest", "selection": "selection ms", "scoring": "scoring ms",
    "times": "times faster", "lower": "% lower", "scoring_share": "scoring %",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A prompt of `images` parts, and how it is pruned: tokens kept per part, or a schedule."""

    name: str
    images: int
    keep: int | None = None
    preset: str | None = None

    @property
    def method(self) -> str:
        """What the pruned side does."""
        return f"script {self.keep}x{self.images}" if self.keep else f"adaptinfer {self.preset}"


CASES = (
    Case(name="llava-1.5-7b", images=1, preset="llava-1.5-7b/64"),
    Case(name="llava-1.5-7b", images=1, keep=64),
    Case(name="llava-next-7b", images=5, keep=64),
)


def run_prefill_bench(
    config_dir: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    cases: tuple[Case, ...] = CASES,
    batches: tuple[int, ...] = (1, 16),
    text_tokens: int = 64,
    repeats: int = 7,
    out: Path | None = None,
) -> list[Row]:
    """The rows of one run, also printed and, with `out`, written as CSV. Raises `EPDError`."""
    from epd_services.prefill_pipeline import PrefillPipeline

    device, kind = device_and_dtype(device, dtype)
    pipeline = PrefillPipeline(config_dir, device=device, dtype=kind, seed=seed)
    results: list[Row] = []
    with progress("prefill bench", len(cases) * len(batches)) as advance:
        for done, (case, batch) in enumerate((c, b) for c in cases for b in batches):
            advance(done, f"{case.name}, {case.method}, batch {batch}")
            results += _pair(pipeline, case, batch, text_tokens, repeats)
        advance(len(cases) * len(batches), "done")
    command = f"python -m epd_services.prefill_bench {config_dir}"
    command += f" --batches {','.join(map(str, batches))}"
    command += f" --text-tokens {text_tokens} --repeats {repeats} --seed {seed}"
    facts = machine(command=command, device=device)
    facts |= {"dtype": str(kind).removeprefix("torch.")}
    rows = [facts | row for row in results]
    if out is not None:
        write_csv(out, rows)
    print("\n" + markdown(rows, _COLUMNS), flush=True)
    return rows


def _pair(
    pipeline: PrefillPipeline, case: Case, batch: int, text_tokens: int, repeats: int
) -> list[Row]:
    """Dense and pruned, the runs taken in turns so that both meet the same clocks."""
    dense, pruned = pipeline.open(case, batch, text_tokens=text_tokens)
    for engine in (dense, pruned):
        for _ in range(3):
            pipeline.prefill(engine)
    both = [(pipeline.prefill(dense), pipeline.prefill(pruned)) for _ in range(repeats)]
    before = [one for one, _ in both]
    after = [two for _, two in both]
    slow = statistics.median(run.total for run in before)
    return [
        _row(case, "dense", batch, before, slow, text_tokens),
        _row(case, case.method, batch, after, slow, text_tokens),
    ]


def _row(
    case: Case, method: str, batch: int, runs: list[Prefill], dense: float, text_tokens: int
) -> Row:
    seconds = statistics.median(run.total for run in runs)
    scoring = statistics.median(run.scoring for run in runs)
    return {
        "case": case.name, "method": method, "batch": batch, "images": case.images,
        "text_tokens": text_tokens, "tokens": runs[0].num_tokens, "prefill": 1000 * seconds,
        "low": 1000 * min(run.total for run in runs),
        "high": 1000 * max(run.total for run in runs),
        "selection": 1000 * statistics.median(run.selection for run in runs),
        "scoring": 1000 * scoring, "times": dense / seconds, "lower": 100 * (1 - seconds / dense),
        "scoring_share": 100 * scoring / seconds, "samples": len(runs), "unit": "ms",
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m epd_services.prefill_bench"
    )
    parser.add_argument("config_dir", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)
    try:
        run_prefill_bench(
            given.config_dir, device=given.device, dtype=given.dtype, seed=given.seed,
            batches=tuple(int(batch) for batch in given.batches.split(",")),
            text_tokens=given.text_tokens, repeats=given.repeats, out=given.out,
        )  # fmt: skip
    except EPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
