"""Cells beside the dense run, as rows: for people, as CSV and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from epd_services.bench_rows import Row
from epd_services.cli.terminal import table
from epd_services.evaluation.journal import Cell
from epd_services.evaluation.methods import DENSE
from epd_services.evaluation.metrics import fails_text, score, text_accuracy

__all__ = ["Result", "rows", "show", "unfit"]

CONTROL = "random"
_COLUMNS = (
    "method", "%", "exact", "rel. %", "95 %", "flips -/+", "text", "in/proc/book", "GMAC",
    "enc ms", "sel ms", "pre ms", "all ms", "KV KiB", "gate",
)  # fmt: skip
_STAGES = ("encoder", "selector", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Result:
    """The cells of a run, the dense one apart; `missing` says why a cell could not be made."""

    dense: Cell
    cells: list[Cell]
    missing: dict[tuple[str, float], str]
    types: list[str]
    seed: int


def rows(result: Result) -> list[Row]:
    """One row per method and budget, the dense run first."""
    random = {c.budget: text_accuracy(c.hits, result.types) for c in result.cells
              if c.method == CONTROL}  # fmt: skip
    made = {(c.method, c.budget): _row(c, result, random.get(c.budget)) for c in result.cells}
    missing = {key: _absent(*key, why) for key, why in result.missing.items()}
    ordered = sorted({**made, **missing}.items(), key=lambda item: -item[0][1])
    return [_row(result.dense, result, None), *(row for _, row in ordered)]


def unfit(made: Sequence[Row]) -> list[str]:
    """Methods that read worse than random tokens at some budget: none may be a default."""
    return list(dict.fromkeys(row["method"] for row in made if row["gate"] == "fails text"))


def show(made: Sequence[Row], title: str) -> None:
    """Print the rows as a table, and the methods that the gate stops."""
    drawn = table(title, _COLUMNS, [_line(row) for row in made])
    drawn.padding = (0, 1, 0, 0)
    for column in drawn.columns[1:-1]:
        column.justify = "right"
    Console(width=None if sys.stdout.isatty() else 200).print(drawn)
    stopped = unfit(made)
    if stopped:
        print(f"reads worse than random tokens, so unfit as a default: {', '.join(stopped)}")


def _row(cell: Cell, result: Result, random: float | None) -> Row:
    dense = cell.method == DENSE
    scored = score(cell.hits, result.dense.hits, result.types, seed=result.seed)
    text = text_accuracy(cell.hits, result.types)
    fails = None if dense or cell.method == CONTROL else fails_text(text, random)
    tokens = cell.tokens
    return {
        "method": cell.method,
        "budget": cell.budget,
        "exact": scored.exact,
        "relative": scored.relative,
        "relative_low": scored.low,
        "relative_high": scored.high,
        "right_to_wrong": scored.lost,
        "wrong_to_right": scored.won,
        "text_exact": "" if text is None else text,
        "gate": {None: "", False: "reads", True: "fails text"}[fails],
        "note": "",
        "tokens_full": tokens.full,
        "tokens_actual": tokens.actual,
        "tokens_booked": tokens.booked_average,
        "tokens_processed": tokens.processed_average,
        "processed_share": tokens.processed_average / tokens.full,
        "processed_by_layer": _joined(tokens.processed),
        "booked_by_layer": _joined(tokens.booked),
        "decoder_macs": cell.decoder_macs,
        "selector_macs": cell.selector_macs,
        "macs": cell.decoder_macs + cell.selector_macs,
        "kv_bytes": cell.kv_bytes,
        **{f"{stage}_ms": 1000 * cell.seconds.get(stage, 0.0) for stage in _STAGES},
        "end_to_end_ms": 1000 * sum(cell.seconds.values()),
        **{f"exact_{kind}": value for kind, value in scored.by_type.items()},
    }


def _absent(method: str, budget: float, why: str) -> Row:
    return {"method": method, "budget": budget, "gate": "", "note": f"out of reach: {why}"}


def _joined(values: Sequence[float]) -> str:
    return "|".join(f"{value:.1f}" for value in values)


def _line(row: Row) -> list[str]:
    start = [row["method"], f"{100 * row['budget']:.1f}"]
    if row["note"]:
        return [*start, *[""] * (len(_COLUMNS) - 3), "out of reach"]
    text = row["text_exact"]
    return [
        *start,
        f"{row['exact']:.3f}",
        f"{100 * row['relative']:.1f}",
        f"{100 * row['relative_low']:.1f}-{100 * row['relative_high']:.1f}",
        f"{row['right_to_wrong']}/{row['wrong_to_right']}",
        f"{text:.2f}" if text != "" else "",
        "/".join(f"{row[f'tokens_{kind}']:.0f}" for kind in ("actual", "processed", "booked")),
        f"{row['macs'] / 1e9:.2f}",
        *(
            f"{row[f'{stage}_ms']:.1f}"
            for stage in ("encoder", "selector", "prefill", "end_to_end")
        ),
        f"{row['kv_bytes'] / 1024:.0f}",
        row["gate"],
    ]
