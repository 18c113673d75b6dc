"""Rows of a benchmark: numbers with everything needed to make them again; CSV and Markdown."""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Row", "asked_on", "machine", "markdown", "percentile", "write_csv"]

Row = dict[str, Any]
_PACKAGES = ("epd", "torch", "triton", "transformers")


def machine(*, command: str, device: str = "cpu") -> Row:
    """Where, when and with what a benchmark ran: the leading columns of each of its rows.

    `device` is named as settings name it: `auto` is a GPU when there is one.
    """
    name, cuda = (_cpu(), "") if device == "cpu" or not _has_gpu() else _gpu(device)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "command": command,
        "device": name,
        "cuda": cuda,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def _cpu() -> str:
    name = platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            named = (line.split(":", 1)[1] for line in file if line.startswith("model name"))
            name = next(named, name)
    except OSError:
        pass
    return f"{name.strip()}, {len(os.sched_getaffinity(0))} cores"


def asked_on(device: str | None, dtype: str | None) -> str:
    """The flags that a command was given for them."""
    named = {"--device": device, "--dtype": dtype}
    return "".join(f" {flag} {value}" for flag, value in named.items() if value)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpu(device: str) -> tuple[str, str]:
    import torch

    facts = torch.cuda.get_device_properties("cuda" if device == "auto" else device)
    return facts.name, str(torch.version.cuda)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source" if package == "epd" else "absent"


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least `percent` % of the values do not exceed; nan of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    rank = math.ceil(percent / 100 * len(ordered))
    return ordered[max(rank, 1) - 1]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write `rows` with a header of all their columns, in order of appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table of the given columns (key to title), numbers aligned to the right."""
    cells = [[_text(row.get(key, "")) for key in columns] for row in rows]
    titles = list(columns.values())
    widths = [max(len(line[i]) for line in [titles, *cells]) for i in range(len(titles))]
    numeric = [all(isinstance(row.get(key) or 0, int | float) for row in rows) for key in columns]

    def line(texts: list[str]) -> str:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([line(titles), f"|{rule}|", *(line(row) for row in cells)])


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)
