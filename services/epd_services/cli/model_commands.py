"""The commands that judge or change a model: `epd eval`, `epd calibrate`, `epd quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epd_services.cli.options import Device, Dtype, Json, Model, exit_with, lazy

__all__ = ["calibrate", "evaluate", "quantize"]


def evaluate(
    model: Model = None,
    bench: Annotated[
        str, typer.Option(help="scenes, or a directory with questions.jsonl and images.")
    ] = "scenes",
    methods: Annotated[
        str, typer.Option(help="Comma-separated, like script[tau=0.5]+fastv; all: every one.")
    ] = "all",
    budgets: Annotated[str, typer.Option(help="Shares of the vision tokens.")] = "0.25,0.11,0.056",
    questions: Annotated[int, typer.Option(min=1, max=100000)] = 1020,
    seed: Annotated[int, typer.Option(min=0, max=2047, help="Which held-out set.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Questions in flight; none: by device.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy over budget (PNG).")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Journal of finished cells; taken up if it exists.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prune by every method at every budget and compare the answers with the dense run's."""
    asked = lazy("evaluation.command", "Evaluation")(
        model=model, bench=bench, methods=methods, budgets=budgets, questions=questions, seed=seed,
        device=device or "auto", dtype=dtype or "auto", batch=batch, csv=csv, plot=plot,
        resume=resume, as_json=as_json,
    )  # fmt: skip
    exit_with(lazy("evaluation.command", "evaluate")(asked))


def calibrate(
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Where the schedule is written.")] = Path(
        "pruning_schedule.json"
    ),
    samples: Annotated[int, typer.Option(min=1, max=100000, help="Scenes to look at.")] = 340,
    seed: Annotated[int, typer.Option(min=0, max=2047, help="Which held-out set.")] = 1001,
    average: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the tokens a layer processes.")
    ] = 0.25,
    shares: Annotated[
        str, typer.Option(help="What each stage keeps, in proportion; one stage each.")
    ] = "133,27,3",
    device: Device = None,
) -> None:
    """Find the layers after which AdaptInfer prunes this model, and write a schedule file."""
    exit_with(lazy("evaluation.calibrate", "calibrate")(
        model, out=out, samples=samples, seed=seed, average=average, shares=shares, device=device
    ))  # fmt: skip


def quantize(
    out: Annotated[Path, typer.Option("-o", "--out", help="A directory that is not there yet.")],
    scheme: Annotated[str, typer.Option(help="w4a16, qqq, fireq or fp8.")],
    kv: Annotated[str, typer.Option("--kv", help="Keys and values: bf16, fp8 or int4.")] = "bf16",
    model: Model = None,
    calib: Annotated[
        str, typer.Option(help="scenes, or a directory of pictures and .txt questions.")
    ] = "scenes",
    samples: Annotated[int, typer.Option(min=1, max=4096)] = 64,
    group_size: Annotated[int | None, typer.Option(help="32, 64, 128; 0: whole rows.")] = None,
    nearest: Annotated[bool, typer.Option("--nearest", help="Only round: the baseline.")] = False,
    rotate: Annotated[bool, typer.Option("--rotate", help="Hadamard-rotate the values.")] = False,
    head: Annotated[
        str | None, typer.Option(help="LM head: fp8 or bf16, as it is; none: fp8 for fireq, fp8.")
    ] = None,
    vision: Annotated[bool, typer.Option("--vision", help="The vision side as well.")] = False,
) -> None:
    """Quantise a model; started again, it goes on where it was stopped."""
    exit_with(lazy("cli.quantize", "quantize")(
        model, out, scheme=scheme, calib=calib, samples=samples, group_size=group_size,
        nearest=nearest, rotate=rotate, kv=kv, head=head, vision=vision,
    ))  # fmt: skip
