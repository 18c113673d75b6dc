"""`epd quantize`: a checkpoint in, the same one in four or eight bits out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from epd.quantize.options import QuantizeOptions
from epd_services.progress import progress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["quantize"]


def quantize(
    model: str | None, out: Path, *, scheme: str, calib: str, samples: int,
    group_size: int | None, nearest: bool, rotate: bool, kv: str = "bf16",
    head: str | None = None, vision: bool = False,
) -> int:  # fmt: skip
    """0, once the quantised checkpoint is at `out`; raises `EPDError` for what cannot be done."""
    options = QuantizeOptions(
        scheme=scheme, group_size=group_size, nearest=nearest, rotate=rotate, kv=kv,
        head=head, vision=vision,
    )  # fmt: skip
    from epd.demo import CHECKPOINT
    from epd.models.card import ModelCard
    from epd.quantize.run import REPORT, calibration_samples, quantize_model

    source = model or str(CHECKPOINT)
    layers = ModelCard.load(source).text.num_layers
    with progress("quantise", layers) as advance:
        report = quantize_model(
            source, out, options, samples=calibration_samples(calib, samples), advance=advance
        )
    for line in _lines(report):
        typer.echo(line)
    typer.echo(f"{out} is ready; the whole report is in {out / REPORT}")
    return 0


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """What the report says, module by module."""
    vision = report["vision"] or {"modules": {}}
    told = [(f"vision {name}", part) for name, part in vision["modules"].items()]
    told += [(f"layer {index:3d}", layer) for index, layer in enumerate(report["layers"])]
    for name, part in told:
        yield (
            f"{name:15s} output error {part['output_error']:.4f}"
            f"  (rounded to nearest: {part['output_error_nearest']:.4f})"
        )
    if "token_error" in vision:
        yield f"{'vision tokens':15s} error {vision['token_error']:.4f}"
    if report["head"] is not None:
        yield f"{'head':15s} output error {report['head']['output_error']:.4f}"
