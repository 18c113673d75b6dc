"""What several commands share: their options, and how they reach a room and end."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KV", "Config", "Device", "Dtype", "Json", "Model", "Topology", "exit_with", "lazy"]

Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Model = Annotated[str | None, typer.Argument(help="Directory or hub id; none: the built-in model.")]
Topology = Annotated[
    str | None, typer.Option(help="Workers by stages, like 1E1P1D, 2E1PD or 1EPD.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
KV = Annotated[str | None, typer.Option("--kv", help="Keys and values: bf16, fp8, int4 or auto.")]


def lazy(module: str, name: str) -> Callable[..., Any]:
    """A function of a room that is imported only now."""
    found: Callable[..., Any] = getattr(import_module(f"epd_services.{module}"), name)
    return found


def exit_with(code: int) -> None:
    """End the command, unless the code is 0."""
    if code:
        raise typer.Exit(code)
