"""The role benchmark: seconds to exchange what roles hold, and the bytes each role holds.

    python -m epd_services.role_bench docs/bench/configs/llava-1.5-7b --out roles.csv

Weights are drawn from a seed, rest in host memory between two roles, and every change is the one a
worker makes after its drain: unload what only the old role needs, load what the new one lacks, with
the device synchronised at both ends. The drain and the two messages of the commit are not in it.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from epd.errors import EPDError
from epd.roles import parse_stages
from epd_services.bench_rows import Row, machine, markdown, write_csv
from epd_services.offline_bench import device_and_dtype

if TYPE_CHECKING:
    import torch

    from epd_services.stage_loader import ModelLoader

__all__ = ["WALK", "main", "role_loader", "run_role_bench"]

WALK = ("E", "D", "E", "D", "P", "D", "PD", "D", "EPD", "E", "EPD", "PD", "E", "D")
"""The roles taken one after the other; the first visit of E and D leaves their weights at rest."""
_UNTIMED = 2
_COLUMNS = {
    "old": "from", "new": "to", "unload_s": "unload s", "load_s": "load s", "total_s": "seconds",
    "resident_gb": "resident GB", "share": "% of all weights",
}  # fmt: skip


def role_loader(
    config_dir: Path,
    scratch: Path,
    *,
    device: str,
    dtype: torch.dtype,
    seed: int,
    warm_bytes: int,
    blocks: int,
) -> ModelLoader:
    """A loader of random weights in the shapes of a config directory, whose copy is `scratch`.

    Its tokenizer, which prefill takes along and nothing here asks, is the built-in model's.
    """
    from epd.config import EngineConfig
    from epd.demo import CHECKPOINT
    from epd.models.card import ModelCard
    from epd.models.decoder import Decoder
    from epd.models.vision import VisionEncoder
    from epd_services.stage_loader import ModelLoader

    path = Path(shutil.copytree(config_dir, scratch, dirs_exist_ok=True))
    if not (path / "tokenizer.json").exists():
        shutil.copy(CHECKPOINT / "tokenizer.json", path)
    card = ModelCard.load(path, weights=False)
    return ModelLoader(
        card, device=device, dtype=dtype, config=EngineConfig(num_blocks=blocks),
        warm_bytes=warm_bytes,
        encoder=lambda: VisionEncoder.random(card, device, dtype, seed),
        decoder=lambda: Decoder.random(card.text, device, dtype, seed),
    )  # fmt: skip


def run_role_bench(loader: ModelLoader, *, device: str) -> list[Row]:
    """A row for every change of `WALK` after the weights of both sides have been made once."""
    rows: list[Row] = []
    for step, (old, new) in enumerate(itertools.pairwise(WALK)):
        if step == 0:
            loader.load(parse_stages(old))
            loader.warm_up()
        marks = []
        for act in (loader.unload, loader.load):
            begin = _now(device)
            act(parse_stages(new))
            marks.append(_now(device) - begin)
        rows.append(
            {"old": old, "new": new, "unload_s": marks[0], "load_s": marks[1],
             "total_s": sum(marks), "resident_gb": loader.resident_bytes / 1e9}
        )  # fmt: skip
    whole = max(row["resident_gb"] for row in rows)
    for row in rows:
        row["share"] = 100 * row["resident_gb"] / whole
    return rows[_UNTIMED:]


def _now(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config_dir", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-bytes", type=int, default=32 << 30)
    parser.add_argument("--blocks", type=int, default=4096)
    asked = parser.parse_args(argv)
    try:
        device, dtype = device_and_dtype(asked.device, asked.dtype)
        with tempfile.TemporaryDirectory() as scratch:
            loader = role_loader(
                asked.config_dir, Path(scratch), device=device, dtype=dtype, seed=asked.seed,
                warm_bytes=asked.warm_bytes, blocks=asked.blocks,
            )  # fmt: skip
            rows = run_role_bench(loader, device=device)
    except EPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = f"python -m epd_services.role_bench {asked.config_dir}"
    if asked.out is not None:
        whence = machine(command=command, device=device)
        write_csv(asked.out, [{**row, **whence} for row in rows])
    print(markdown(rows, _COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
