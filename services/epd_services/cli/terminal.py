"""What the command line says to people: errors in three lines, tables, notes. Standard error is
for people, standard output for results.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from epd.errors import (
    CheckpointError,
    ConfigError,
    EPDError,
    InvalidRequestError,
    RoleError,
    UnavailableError,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["note", "print_json", "show_table", "table", "three_lines", "usage_error", "width"]

_FRAMES: dict[type[EPDError], tuple[str, str]] = {
    ConfigError: ("The settings cannot work.", "epd config show"),
    CheckpointError: ("The model cannot be served.", "epd doctor"),
    RoleError: ("The stages cannot work.", "epd worker --help"),
    InvalidRequestError: ("The request was refused.", "epd ask --help"),
    UnavailableError: ("The service cannot take the request now.", "epd doctor"),
}


_STYLES = {"ok": "green", "yes": "green", "warn": "yellow", "fail": "red", "NO": "red"}


def usage_error(what: str, why: str, hint: str) -> ConfigError:
    """An error in three lines: what failed, why, and what to type next."""
    return ConfigError(f"{what}\n{why}\n{hint}")


def three_lines(error: EPDError) -> str:
    """Any error as three lines; one that says only why gets the rest from its class."""
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(parts) >= 3:
        what, why, hint = parts[0], " ".join(parts[1:-1]), parts[-1]
    else:
        what, hint = next(
            (_FRAMES[kind] for kind in type(error).__mro__ if kind in _FRAMES),
            ("The command failed.", "epd doctor"),
        )
        why = " ".join(parts) or error.code
    return f"error: {what}\n  why: {why}\n next: {hint}"


def note(text: str) -> None:
    """Tell people something that is no result."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table for `show_table`; numbers are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = [list(row) for row in rows]
    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for index, name in enumerate(columns):
        numeric = bool(lines) and all(isinstance(line[index], int | float) for line in lines)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        made.add_row(*(Text(_text(cell), _STYLES.get(str(cell), "")) for cell in line))
    return made


def width() -> int:
    """Columns of standard output, wide enough for a log when that is no terminal."""
    from rich.console import Console

    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console().width if told else 140


def show_table(made: Table) -> None:
    """Print a table on standard output."""
    from rich.console import Console

    Console(width=width()).print(made)


def _text(cell: object) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
