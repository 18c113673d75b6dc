"""The offline benchmark: one process, no network, random weights of a given shape.

    python -m epd_services.offline_bench docs/bench/configs/llava-1.5-7b --out offline.csv

Times are wall clock with the device synchronised at both ends, after warm-up, medians unless said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from epd.errors import ConfigError, EPDError, InvalidRequestError
from epd_services.bench_rows import Row, machine, markdown, percentile, write_csv
from epd_services.progress import progress

if TYPE_CHECKING:
    import torch

    from epd.pruning_spec import PruningSpec
    from epd_services.offline_pipeline import OfflinePipeline
    from epd_services.progress import Advance

__all__ = ["Workload", "device_and_dtype", "main", "run_from_cli", "run_offline_bench"]

_COLUMNS = {
    "metric": "measure", "images": "images", "batch": "batch", "requests": "requests",
    "output_tokens": "output tokens", "value": "value", "unit": "unit", "samples": "samples",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured; the defaults are the table in the README."""

    image_counts: tuple[int, ...] = (1, 4)
    repeats: int = 7
    batches: tuple[int, ...] = (1, 8, 32)
    decode_steps: int = 128
    requests: int = 256
    outputs: tuple[int, ...] = (16, 128)
    text_tokens: int = 64

    @property
    def measurements(self) -> int:
        """How many there are, for the progress bar."""
        return len(self.image_counts) + len(self.batches) + len(self.outputs)


def run_offline_bench(
    config_dir: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    workload: Workload | None = None,
    out: Path | None = None,
    kv: str = "auto",
    quantize: str | None = None,
    pruning: str | None = None,
    cuda_graphs: bool = True,
) -> list[Row]:
    """The rows of one run, also printed and, with `out`, written as CSV. Raises `EPDError`.

    `kv` is how keys and values are held, as `epd serve --kv` takes it; `quantize` a scheme that
    the random weights are rounded to; `pruning` JSON as EPD_PRUNING takes it. Without `cuda_graphs`
    steps are launched kernel by kernel.
    """
    from epd_services.offline_pipeline import OfflinePipeline, Sizes

    work, spec = workload or Workload(), _spec(pruning)
    device, kind = device_and_dtype(device, dtype)
    begin = time.perf_counter()
    with progress("offline bench", work.measurements + 1) as advance:
        advance(0, "making random weights")
        sizes = Sizes(
            text_tokens=work.text_tokens,
            max_num_seqs=max([work.requests, *work.batches]),
            longest_output=max([*work.outputs, work.decode_steps + 16]),
        )
        pipeline = OfflinePipeline(
            config_dir, device=device, dtype=kind, seed=seed, sizes=sizes, kv=kv, scheme=quantize,
            cuda_graphs=cuda_graphs, pruning=spec,
        )  # fmt: skip
        results = _measure(pipeline, work, advance)
        advance(work.measurements + 1, "done")
    command = _command(config_dir, kv, quantize, pruning)
    facts = machine(command=command, device=device) | {
        "model": config_dir.resolve().name,
        "dtype": str(kind).removeprefix("torch."),
        "weight_bytes": pipeline.weight_bytes,
        "quantize": quantize or "",
        "kv": kv,
        "pruning": pruning or "",
        "cuda_graphs": int(cuda_graphs and device.startswith("cuda")),
        "kv_blocks": pipeline.core.stats().blocks_total,
    }
    rows = [facts | row for row in results]
    if out is not None:
        write_csv(out, rows)
    _print(rows, time.perf_counter() - begin)
    return rows


def run_from_cli(
    config_dir: Path, *, random_weights: bool, out: Path | None, device: str | None,
    dtype: str | None, seed: int, kv: str | None = None, quantize: str | None = None,
    pruning: str | None = None,
) -> None:  # fmt: skip
    """What `epd bench --offline` does. Raises `EPDError`."""
    if not random_weights:
        raise ConfigError(
            "Cannot benchmark offline with trained weights.\n"
            "Prompts and pictures are random, so that only shapes matter.\n"
            f"{_command(config_dir)}"
        )
    run_offline_bench(
        config_dir, device=device or "auto", dtype=dtype or "auto", seed=seed, out=out,
        kv=kv or "auto", quantize=quantize, pruning=pruning,
    )  # fmt: skip


def _spec(pruning: str | None) -> PruningSpec | None:
    """The pruning that JSON describes. Raises `ConfigError`."""
    from epd.pruning_spec import PruningSpec

    if pruning is None:
        return None
    try:
        return PruningSpec.parse(json.loads(pruning))
    except json.JSONDecodeError:
        raise _unprunable("It is not JSON.") from None
    except InvalidRequestError as error:
        raise _unprunable(f"{error.param}: {error}.") from None


def _unprunable(why: str) -> ConfigError:
    example = '--pruning \'{"method":"dpp","keep":64}\''
    return ConfigError(f"Cannot prune as --pruning says.\n{why}\n{example}")


def device_and_dtype(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """The device and dtype that "auto" means here; gradients are off from now on."""
    import torch

    from epd.tensors import torch_dtype

    torch.set_grad_enabled(False)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device} was asked for, but this machine has no usable GPU")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return device, torch_dtype(dtype)


def _measure(pipeline: OfflinePipeline, work: Workload, advance: Advance) -> list[Row]:
    rows: list[Row] = []
    done = 1
    for images in work.image_counts:
        advance(done, f"time to first token, {images} image(s)")
        rows += _first_token(pipeline, images, work.repeats)
        done += 1
    for batch in work.batches:
        advance(done, f"time per output token, batch {batch}")
        rows += _per_token(pipeline, batch, work.decode_steps)
        done += 1
    for output in work.outputs:
        advance(done, f"{work.requests} requests, {output} output tokens")
        rows += _throughput(pipeline, work.requests, output)
        done += 1
    return rows


def _first_token(pipeline: OfflinePipeline, images: int, repeats: int) -> list[Row]:
    """TTFT without waits inside, then its parts with the device waited for between stages."""
    for split in (False, True):
        pipeline.first_token(pipeline.pictures(images), split=split)
    whole = [
        pipeline.first_token(pipeline.pictures(images), split=False).total for _ in range(repeats)
    ]
    parts = [pipeline.first_token(pipeline.pictures(images), split=True) for _ in range(repeats)]
    values = {
        "TTFT": whole,
        "TTFT: pixels on the host": [part.pixels for part in parts],
        "TTFT: encode": [part.encode for part in parts],
        "TTFT: prefill and first token": [part.prefill for part in parts],
    }
    return [
        _row(name, 1000 * statistics.median(seconds), "ms", images=images, batch=1, samples=repeats)
        for name, seconds in values.items()
    ]


def _per_token(pipeline: OfflinePipeline, batch: int, steps: int) -> list[Row]:
    pipeline.decode_seconds(batch, steps=8)
    seconds = pipeline.decode_seconds(batch, steps=steps)
    facts = {"images": 1, "batch": batch, "output_tokens": steps, "samples": len(seconds)}
    return [
        _row("TPOT", 1000 * statistics.mean(seconds), "ms", **facts),
        _row("TPOT, 99th percentile step", 1000 * percentile(seconds, 99), "ms", **facts),
    ]


def _throughput(pipeline: OfflinePipeline, requests: int, output: int) -> list[Row]:
    for _ in pipeline.burst(pipeline.pictures(min(requests, 16)), 4):
        pass
    pictures = pipeline.pictures(requests)
    begin = pipeline.synchronize()
    for _ in pipeline.burst(pictures, output):
        pass
    seconds = pipeline.synchronize() - begin
    facts = {"images": 1, "requests": requests, "output_tokens": output, "samples": 1}
    return [
        _row("requests/s, all present at once", requests / seconds, "1/s", **facts),
        _row("output tokens/s, the same run", requests * output / seconds, "1/s", **facts),
    ]


def _row(metric: str, value: float, unit: str, **facts: int) -> Row:
    empty = {"images": "", "batch": "", "requests": "", "output_tokens": "", "samples": ""}
    return {"metric": metric, **empty, **facts, "value": value, "unit": unit}


def _command(
    config_dir: Path, kv: str = "auto", quantize: str | None = None, pruning: str | None = None
) -> str:
    words = ["epd bench --offline", str(config_dir), "--random-weights"]
    words += ["--quantize", quantize] if quantize else []
    words += ["--kv", kv] if kv != "auto" else []
    words += ["--pruning", f"'{pruning}'"] if pruning else []
    return " ".join(words)


def _print(rows: list[Row], seconds: float) -> None:
    facts = rows[0]
    weights = f"{facts['quantize']} weights" if facts["quantize"] else facts["dtype"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "transformers"))
    print(
        f"\n{facts['model']}, random weights, {weights}, KV {facts['kv']}, "
        f"pruning {facts['pruning'] or 'none'}, {facts['device']} "
        f"({versions}), {facts['date']} UTC, {seconds:.0f} s in all\n"
    )
    print(markdown(rows, _COLUMNS), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m epd_services.offline_bench"
    )
    parser.add_argument("config_dir", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--quantize")
    parser.add_argument("--pruning")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--short", action="store_true", help="64 decode steps and no burst")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=Workload().requests)
    given = parser.parse_args(arguments)
    work = Workload(requests=given.requests)
    if given.short:
        work = Workload(repeats=3, decode_steps=64, requests=32, outputs=())
    try:
        run_offline_bench(
            given.config_dir, device=given.device, dtype=given.dtype, seed=given.seed,
            workload=work, out=given.out, kv=given.kv, quantize=given.quantize,
            pruning=given.pruning, cuda_graphs=not given.no_cuda_graphs,
        )  # fmt: skip
    except EPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
