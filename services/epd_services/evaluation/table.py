"""Cells beside the dense run, as rows: for people, as CSV and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epd_services.bench_rows import Row
from epd_services.cli.terminal import show_table, table
from epd_services.evaluation.journal import Cell
from epd_services.evaluation.methods import DENSE
from epd_services.evaluation.metrics import fails_text, score, text_accuracy

__all__ = ["Result", "rows", "show", "unfit"]

CONTROL = "random"
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
    columns = {
        "method": "method", "budget": "budget", "exact": "exact", "relative": "relative",
        "interval": "95 %", "lost": "r→w", "won": "w→r", "text": "text", "gate": "gate",
        "entering": "enter", "processed": "proc.", "booked": "booked", "gmacs": "GMAC",
        "selector_ms": "sel. ms", "prefill_ms": "prefill ms", "total_ms": "total ms",
        "kv_kib": "KV KiB",
    }  # fmt: skip
    show_table(table(title, list(columns.values()), [_line(row, columns) for row in made]))
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


def _line(row: Row, columns: dict[str, str]) -> list[object]:
    if row["note"]:
        shown = {"method": row["method"], "budget": _percent(row["budget"]), "exact": "-",
                 "gate": "out of reach"}  # fmt: skip
        return [shown.get(name, "") for name in columns]
    shown = {
        "method": row["method"], "budget": _percent(row["budget"]), "exact": f"{row['exact']:.3f}",
        "relative": _percent(row["relative"]),
        "interval": f"{100 * row['relative_low']:.1f}-{100 * row['relative_high']:.1f}",
        "lost": str(row["right_to_wrong"]), "won": str(row["wrong_to_right"]),
        "text": f"{row['text_exact']:.3f}" if row["text_exact"] != "" else "", "gate": row["gate"],
        "entering": f"{row['tokens_actual']:.0f}", "processed": f"{row['tokens_processed']:.0f}",
        "booked": f"{row['tokens_booked']:.0f}", "gmacs": f"{row['macs'] / 1e9:.2f}",
        "selector_ms": f"{row['selector_ms']:.2f}", "prefill_ms": f"{row['prefill_ms']:.2f}",
        "total_ms": f"{row['end_to_end_ms']:.2f}", "kv_kib": f"{row['kv_bytes'] / 1024:.0f}",
    }  # fmt: skip
    return [shown[name] for name in columns]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
