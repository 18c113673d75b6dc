"""Measures the service times that the simulation takes: one worker's stages, alone, one thread.

The clock is the thread's own: it stands still while other processes have the core. Medians.

    python -m epd_services.elastic.measure docs/bench/elastic_times.csv
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from epd.demo import CHECKPOINT
from epd_services.bench_rows import Row, machine, write_csv
from epd_services.progress import progress

if TYPE_CHECKING:
    from epd_services.offline_pipeline import OfflinePipeline

__all__ = ["fitted", "main", "measure"]

_IMAGES = (1, 2, 4, 8)
_PROMPTS = (1, 2, 4)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_REPEATS, _STEPS, _LONGEST = 15, 100, 320


def measure() -> list[Row]:
    """Seconds by stage and batch, for the built-in model's shapes on this machine.

    A prompt of n images stands for a batch of n prompts of one image: the same tokens.
    """
    import torch

    from epd_services.offline_pipeline import OfflinePipeline, Sizes

    class _Alone(OfflinePipeline):
        def synchronize(self) -> float:
            return time.thread_time()

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    sizes = Sizes(max_num_seqs=max(_BATCHES), longest_output=_LONGEST)
    pipeline = _Alone(CHECKPOINT, device="cpu", dtype=torch.float32, seed=0, sizes=sizes)
    rows: list[Row] = []
    steps = len(_IMAGES) + len(_PROMPTS) + len(_BATCHES)
    with progress("service times", steps) as advance:
        for stage, batches, seconds in (
            ("encode", _IMAGES, _encode),
            ("prefill", _PROMPTS, _prefill),
            ("decode", _BATCHES, _decode),
        ):
            for batch in batches:
                advance(len(rows), f"{stage} {batch}")
                rows.append({"stage": stage, "batch": batch, "seconds": seconds(pipeline, batch)})
        advance(steps, "done")
    return rows


def _typical(run: Callable[[], float]) -> float:
    run()
    return statistics.median(run() for _ in range(_REPEATS))


def _encode(pipeline: OfflinePipeline, images: int) -> float:
    pictures = pipeline.pictures(images)

    def once() -> float:
        begin = pipeline.synchronize()
        pipeline.encoder.encode(pictures)
        return pipeline.synchronize() - begin

    return _typical(once)


def _prefill(pipeline: OfflinePipeline, prompts: int) -> float:
    pictures = pipeline.pictures(prompts)
    return _typical(lambda: pipeline.first_token(pictures, split=True).prefill)


def _decode(pipeline: OfflinePipeline, batch: int) -> float:
    pipeline.decode_seconds(batch, steps=4)
    return statistics.median(pipeline.decode_seconds(batch, steps=_STEPS))


def fitted(rows: list[Row], stage: str) -> tuple[float, float]:
    """Base and seconds per item of a stage's rows by least squares, the base at least zero."""
    points = [(float(r["batch"]), float(r["seconds"])) for r in rows if r["stage"] == stage]
    if len(points) > 1:
        slope, base = statistics.linear_regression(*zip(*points, strict=True))
        if base > 0:
            return base, slope
    slope, _ = statistics.linear_regression(*zip(*points, strict=True), proportional=True)
    return 0.0, slope


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the file, print the fits; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, nargs="?", default=Path("elastic_times.csv"))
    out = parser.parse_args(arguments).out
    facts = machine(command="python -m epd_services.elastic.measure")
    rows = [facts | row for row in measure()]
    write_csv(out, rows)
    for stage in ("encode", "prefill", "decode"):
        base, per_item = fitted(rows, stage)
        print(f"{stage}: {1000 * base:.2f} ms + {1000 * per_item:.2f} ms each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
