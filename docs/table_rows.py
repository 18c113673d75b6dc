"""Measured rows in, Markdown out: what every table of the pages is made with."""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["DOCS", "markdown", "measured", "read"]

DOCS = Path(__file__).parent


def read(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file under docs/."""
    with (DOCS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: list[str], cells: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def measured(row: dict[str, str]) -> str:
    """The command, device, versions and time behind a row."""
    versions = f"torch {row['torch']}, transformers {row['transformers']}"
    return f"`{row['command']}`, {row['device']}, {versions}, {row['date']} UTC.\n\n"
