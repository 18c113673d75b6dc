"""A progress bar on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Advance", "progress"]

Advance = Callable[[int, str], None]


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A function that takes how much is done and a word on what is happening now."""
    if not sys.stderr.isatty() or os.environ.get("CI"):
        yield _lines(title, total)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def _lines(title: str, total: int) -> Advance:
    """A line whenever the note changes, and one at the end."""
    said: list[tuple[str, bool]] = []

    def advance(done: int, note: str) -> None:
        now = (note, done >= total)
        if said[-1:] != [now]:
            said.append(now)
            print(f"{title}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    return advance
