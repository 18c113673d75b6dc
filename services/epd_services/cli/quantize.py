"""`epd quantize`: a checkpoint in, the same one in four or eight bits out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from epd.quantize.options import QuantizeOptions
from epd_services.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["quantize"]


def quantize(
    model: str | None, out: Path, *, scheme: str, calib: str, samples: int,
    group_size: int | None, nearest: bool, rotate: bool, kv: str = "bf16",
) -> int:  # fmt: skip
    """0, once the quantised checkpoint is at `out`; raises `EPDError` for what cannot be done."""
    options = QuantizeOptions(
        scheme=scheme, group_size=group_size, nearest=nearest, rotate=rotate, kv=kv
    )
    from epd.demo import CHECKPOINT
    from epd.models.card import ModelCard
    from epd.quantize.run import REPORT, calibration_samples, quantize_model

    source = model or str(CHECKPOINT)
    layers = ModelCard.load(source).text.num_layers
    with progress("quantise", layers) as advance:
        report = quantize_model(
            source, out, options, samples=calibration_samples(calib, samples), advance=advance
        )
    for index, layer in enumerate(report["layers"]):
        typer.echo(
            f"layer {index:3d}  output error {layer['output_error']:.4f}"
            f"  (rounded to nearest: {layer['output_error_nearest']:.4f})"
        )
    typer.echo(f"{out} is ready; the whole report is in {out / REPORT}")
    return 0
