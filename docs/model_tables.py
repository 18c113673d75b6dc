"""Tables of accuracy, pruning, kernels over coded KV, and quantised models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from table_rows import DOCS, markdown, measured, read

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MODEL_TABLES"]


def _accuracy() -> str:
    dense = json.loads((DOCS / "bench/accuracy.json").read_text())
    pruned = json.loads((DOCS / "bench/accuracy_dpp_25.json").read_text())
    rows = [
        [name, str(told["asked"]), _share(told), _share(pruned["types"][name])]
        for name, told in sorted(dense["types"].items())
    ]
    overall = [f"**{report['accuracy']:.3f}**" for report in (dense, pruned)]
    rows.append(["**overall**", str(dense["questions"]), *overall])
    header = ["question type", "asked", "all vision tokens", "25 % kept by greedy DPP"]
    return measured(dense) + markdown(header, rows)


def _share(told: dict[str, int]) -> str:
    return f"{told['right'] / told['asked']:.3f}"


def _pruning() -> str:
    rows = read("eval/scenes.csv")
    budgets = sorted({float(row["budget"]) for row in rows} - {1.0}, reverse=True)
    found = {(row["method"], float(row["budget"])): row for row in rows}
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "none"]
    cells = [[name, *(_relative(found[name, budget]) for budget in budgets)] for name in methods]
    dense = found["none", 1.0]
    header = ["% of the dense run's answers", *(f"{100 * budget:g} %" for budget in budgets)]
    told = f"Dense: {float(dense['exact']):.3f} exact of {dense['questions']} questions. "
    return told + measured(dense) + markdown(header, cells)


_HEADLINES = (
    "script", "script+adaptinfer[layers=2,enter=1.05]", "dpp", "cdpruner",
    "dpp+fastv[layers=2,enter=1.05]", "dpp+sparsevlm[layers=2,enter=1.05]", "vispruner", "random",
)  # fmt: skip


def _pruning_headlines() -> str:
    text = _pruning().splitlines(keepends=True)
    chosen = tuple(f"| {name} |" for name in _HEADLINES)
    return "".join(
        line
        for line in text
        if not line.startswith("| ") or line.startswith(("| %", "| ---", *chosen))
    )


def _prefill() -> str:
    rows = read("bench/prefill_h200.csv")
    columns = {
        "case": "shape", "method": "method", "batch": "batch", "prefill": "ms",
        "selection": "of it selection", "scoring_share": "of it scoring, %",
        "times": "times faster",
    }  # fmt: skip
    cells = [[row[name] for name in columns] for row in rows]
    return measured(rows[0]) + markdown(list(columns.values()), cells)


def _selection() -> str:
    rows = [row for row in read("bench/selection_h200.csv") if row["part"].startswith("script")]
    cells = [
        [
            row["case"], *(f"{float(row[t]) / 1000:.3g}" for t in _SELECTION_TIMES), row["bar_ms"],
            f"{100 * float(row['alike']):.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["what", *_SELECTION_TIMES.values(), "bar", "same tokens, %"]
    one = rows[0]
    versions = f"torch {one['torch']}, Triton {one['triton']}, {one['commit']}, {one['date']}"
    return f"{one['device']}, {versions}.\n\n" + markdown(header, cells)


def _kv_decode() -> str:
    return _kv_attention("kv-decode", ("bf16", "fp8", "int4"))


def _kv_prefill() -> str:
    return _kv_attention("kv-prefill", ("bf16", "sdpa-flash", "fp8", "int4"))


def _kv_attention(op: str, impls: tuple[str, ...]) -> str:
    """Microseconds, and our bf16 kernel's time over each."""
    times: dict[str, dict[str, float]] = {}
    rows = [row for row in read("bench/kv_attention_h200.csv") if row["op"] == op]
    for row in rows:
        times.setdefault(row["shape"], {})[row["impl"]] = float(row["p50_us"])
    cells = []
    for shape, found in times.items():
        told = dict(word.split("=") for word in shape.split())
        each = [
            f"{found[impl]:.0f} ({found['bf16'] / found[impl]:.2f}x)" if impl in found else ""
            for impl in impls[1:]
        ]
        cells.append([told["S"], told["q"], told["L"], f"{found['bf16']:.0f}", *each])
    header = ["sequences", "queries of each", "positions", "bf16 KV, µs", *impls[1:]]
    one = rows[-1]
    versions = f"torch {one['torch']}, Triton {one['triton']}, {one['commit']}, {one['date']}"
    return f"{one['device']}, {versions}.\n\n" + markdown(header, cells)


def _quantize_kv() -> str:
    rows = read("eval/quantize_kv.csv")
    cells = [
        [
            row["scheme"], row["kv"], row["kv_fallbacks"], row["method"],
            f"{row['correct']} of {row['questions']}", f"{100 * float(row['accuracy']):.1f}",
            _points(row["accuracy"], rows[0]["accuracy"]),
            f"{100 * float(row['same_tokens']):.1f}", _error(row["layer_output_error"]),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["weights", "KV", "layers that fell back", "rounding", "right", "accuracy, %",
              "points over plain", "same tokens, %", "layer error, %"]  # fmt: skip
    return markdown(header, cells)


def _quantize_pruning() -> str:
    cells = [
        [
            row["model"], row["kv"], row["method"],
            f"{100 * float(row['budget']):g} %" if row["budget"] else "all",
            f"{row['correct']} of {row['questions']}", f"{100 * float(row['accuracy']):.1f}",
            _points(row["accuracy"], row["dense_accuracy"]),
            _points(row["accuracy"], row["plain_accuracy"]), row["jaccard"],
        ]
        for row in read("eval/quantize_pruning.csv")
    ]  # fmt: skip
    header = ["model", "KV", "pruning", "kept", "right", "accuracy, %", "points over unpruned",
              "points over plain", "overlap (Jaccard)"]  # fmt: skip
    return markdown(header, cells)


def _points(share: str, base: str) -> str:
    return f"{100 * (float(share) - float(base)):+.1f}"


def _error(value: str) -> str:
    return f"{100 * float(value):.2f}" if value else ""


_SELECTION_TIMES = {
    "device_us": "device, ms", "clock_us": "launched from Python", "torch_us": "eager torch",
}  # fmt: skip


def _relative(row: dict[str, str]) -> str:
    if row["note"]:
        return "out of reach"
    share, low, high = (
        100 * float(row[name]) for name in ("relative", "relative_low", "relative_high")
    )
    return f"{share:.1f} ({low:.1f}\u2013{high:.1f})" + (
        " †" if row["gate"] == "fails text" else ""
    )


MODEL_TABLES: dict[str, Callable[[], str]] = {
    "accuracy": _accuracy,
    "kv_decode": _kv_decode,
    "kv_prefill": _kv_prefill,
    "pruning": _pruning,
    "pruning_headlines": _pruning_headlines,
    "prefill": _prefill,
    "selection": _selection,
    "quantize_kv": _quantize_kv,
    "quantize_pruning": _quantize_pruning,
}
