"""Finished cells of an evaluation in a file, so that a run can be taken up where it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from epd_services.cli.terminal import usage_error

__all__ = ["Cell", "Journal", "RunFacts", "Tokens"]


class RunFacts(msgspec.Struct, frozen=True):
    """What every cell of one table has in common: another value is another table."""

    model: str
    revision: str
    bench: str
    bench_digest: str
    questions: int
    seed: int
    device: str
    dtype: str
    batch: int
    max_tokens: int


class Tokens(msgspec.Struct, frozen=True):
    """Vision tokens of the average question, of `full` that the encoder made.

    `processed` and `booked` hold one number per decoder layer; booked counts a pruning layer at its
    length afterwards, as published averages do.
    """

    full: float
    actual: float
    processed: list[float]
    booked: list[float]

    @property
    def processed_average(self) -> float:
        return sum(self.processed) / len(self.processed)

    @property
    def booked_average(self) -> float:
        return sum(self.booked) / len(self.booked)


class Cell(msgspec.Struct, frozen=True):
    """What one method at one budget gave. `right` has a 1 or 0 per question; the rest is per
    question on average. `fingerprint` names every hyper-parameter of the method.
    """

    method: str
    budget: float
    fingerprint: str
    right: str
    seconds: dict[str, float]
    tokens: Tokens
    decoder_macs: float
    selector_macs: float
    kv_bytes: float

    @property
    def hits(self) -> list[bool]:
        """Whether each question was answered right."""
        return [mark == "1" for mark in self.right]


class Journal:
    """The cells of one table; without a file they are kept in memory alone."""

    def __init__(self, facts: RunFacts, path: Path | None = None) -> None:
        self._path = path
        self._cells: dict[tuple[str, float], Cell] = {}
        if path is None:
            return
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        torn = lines.pop()
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(msgspec.json.encode(facts) + b"\n")
            return
        if torn:  # the run ended while it wrote this line
            path.write_bytes(b"\n".join(lines) + b"\n")
        self._read(lines, facts)

    def get(self, method: str, budget: float, fingerprint: str) -> Cell | None:
        """The cell if it was finished; one made with other hyper-parameters is an error."""
        cell = self._cells.get((method, budget))
        if cell is not None and cell.fingerprint != fingerprint:
            raise self._refusal(f"it has {method} with other hyper-parameters")
        return cell

    def add(self, cell: Cell) -> None:
        """Write down a finished cell."""
        self._cells[cell.method, cell.budget] = cell
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(cell) + b"\n")

    def _read(self, lines: list[bytes], facts: RunFacts) -> None:
        try:
            found: Any = msgspec.json.decode(lines[0], type=RunFacts)
            cells = [msgspec.json.decode(line, type=Cell) for line in lines[1:]]
        except msgspec.DecodeError as error:
            raise self._refusal(f"it is no journal of an evaluation ({error})") from None
        for name in RunFacts.__struct_fields__:
            if getattr(found, name) != getattr(facts, name):
                told = f"{name} {getattr(found, name)!r}, not {getattr(facts, name)!r}"
                raise self._refusal(f"it was made with {told}")
        self._cells = {(cell.method, cell.budget): cell for cell in cells}

    def _refusal(self, why: str) -> Exception:
        return usage_error(
            f"Cannot take up the evaluation in {self._path}.", f"{why[:1].upper()}{why[1:]}.",
            "epd eval --resume ANOTHER_FILE",
        )  # fmt: skip
