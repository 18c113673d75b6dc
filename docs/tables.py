"""Writes the tables of README.md and of the pages in docs/ from the measured files there.

With `--check` it fails if they are stale. A table stands between `<!-- table: NAME -->` and `<!--
end -->`.

    python docs/tables.py [--check]
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent
PAGES = (
    DOCS.parent / "README.md", DOCS / "elastic.md", DOCS / "eval/README.md",
    DOCS.parent / "pruning/README.md", DOCS / "quantization.md", DOCS / "admin.md",
)  # fmt: skip
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _rows(name: str) -> list[dict[str, str]]:
    with (DOCS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def _measured(row: dict[str, str]) -> str:
    versions = f"torch {row['torch']}, transformers {row['transformers']}"
    return f"`{row['command']}`, {row['device']}, {versions}, {row['date']} UTC.\n\n"


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
    return _measured(dense) + _markdown(header, rows)


def _share(told: dict[str, int]) -> str:
    return f"{told['right'] / told['asked']:.3f}"


_OFFLINE_RUNS = {
    "": "bf16", "pruned_": "Script, 64 of 576", "w4a8_": "W4A8-FP8, INT4 KV", "all_": "all three",
}  # fmt: skip


def _offline() -> str:
    """The runs side by side; each has the same rows."""
    runs = [_rows(f"bench/offline_{name}h200.csv") for name in _OFFLINE_RUNS]
    told = ["metric", "images", "batch", "requests", "output_tokens"]
    cells = [
        [*(row[name] for name in told), *(same["value"] for same in rows), row["unit"]]
        for row in runs[0]
        for rows in [[_same(run, row, told) for run in runs]]
    ]
    header = ["measure", "images", "batch", "requests", "output tokens",
              *_OFFLINE_RUNS.values(), "unit"]  # fmt: skip
    return "".join(_measured(run[0]) for run in runs) + _markdown(header, cells)


def _same(run: list[dict[str, str]], row: dict[str, str], told: list[str]) -> dict[str, str]:
    return next(other for other in run if all(other[name] == row[name] for name in told))


def _roles() -> str:
    rows = _rows("bench/roles_h200.csv")
    columns = {"old": "from", "new": "to", "unload_s": "unload s", "load_s": "load s",
               "resident_gb": "weights then held, GB", "share": "% of all weights"}  # fmt: skip
    cells = [[_rounded(row[name]) for name in columns] for row in rows]
    return _measured(rows[0]) + _markdown(list(columns.values()), cells)


def _switches_gpu() -> str:
    """What the switches took, then what the requests saw."""
    rows = _rows("bench/switches_h200.csv")
    columns = {"worker": "worker", "change": "switch", "drain_s": "drain s",
               "unload_s": "unload s", "load_s": "load s", "total_s": "seconds"}  # fmt: skip
    load = {"under": "load", "requests": "requests", "requests_per_s": "answers/s", "lost": "lost",
            "duplicate": "doubled", "wrong": "wrong", "refused": "errors", "retries": "retries",
            "ttft_p50_ms": "TTFT p50 ms", "ttft_p99_ms": "TTFT p99 ms",
            "tpot_p50_ms": "TPOT p50 ms", "tpot_p99_ms": "TPOT p99 ms"}  # fmt: skip
    tables = [
        _markdown(list(told.values()),
                  [[_rounded(row[name]) for name in told] for row in rows if row["row"] == kind])
        for kind, told in (("switch", columns), ("load", load))
    ]  # fmt: skip
    return _measured(rows[0]) + "\n".join(tables)


def _rounded(value: str) -> str:
    """Seconds to the millisecond; what is no small fraction stays as it is."""
    try:
        return f"{float(value):.3f}" if "." in value and float(value) < 1 else value
    except ValueError:
        return value


def _serving() -> str:
    rows = _rows("bench/cpu.csv")
    columns = {
        "system": "system", "load": "load", "requests_per_s": "requests/s",
        "ttft_p50_ms": "TTFT p50 ms", "ttft_p99_ms": "TTFT p99 ms",
        "tpot_p50_ms": "TPOT p50 ms", "tpot_p99_ms": "TPOT p99 ms",
        "lost": "lost", "duplicate": "doubled", "wrong": "wrong",
    }  # fmt: skip
    cells = [[row[name] for name in columns] for row in rows]
    return _measured(rows[0]) + _markdown(list(columns.values()), cells)


def _simulated_shift() -> str:
    return _simulated(_shift_rows())


def _simulated_shapes() -> str:
    return _simulated([row for row in _rows("bench/elastic.csv") if row["scenario"] != "shift"])


def _shift_rows() -> list[dict[str, str]]:
    return [row for row in _rows("bench/elastic.csv") if row["scenario"] == "shift"]


def _simulated(rows: list[dict[str, str]]) -> str:
    cells = [
        [
            row["times"], row["trace"], row["policy"], row["latency_s"],
            f"{float(row['latency_gain']):.2f}", row["ttft_s"], row["tpot_ms"],
            f"{float(row['tpot_gain']):.2f}", row["switches"], row["most_per_worker"],
            row["last_split"],
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "service times", "trace", "policy", "latency s", "gain", "TTFT s", "TPOT ms", "gain",
        "switches", "most by one", "ends as",
    ]  # fmt: skip
    return f"`{rows[0]['command']}`, {rows[0]['date']} UTC.\n\n" + _markdown(header, cells)


def _real_shift() -> str:
    return _real(_rows("bench/elastic_real.csv"))


def _real_shift_light() -> str:
    return _real(_rows("bench/elastic_real_light.csv"))


def _real(rows: list[dict[str, str]]) -> str:
    columns = {
        "policy": "policy", "run": "run", "latency_s": "latency s", "ttft_s": "TTFT s",
        "tpot_ms": "TPOT ms", "seconds": "all answered after s", "lost": "lost", "wrong": "wrong",
        "switches": "switches", "most_per_worker": "most by one",
        "switch_seconds": "a switch took s", "last_split": "ends as",
        "load_average": "load average",
    }  # fmt: skip
    cells = [[row[name] for name in columns] for row in rows]
    return _measured(rows[0]) + _markdown(list(columns.values()), cells)


def _pruning() -> str:
    rows = _rows("eval/scenes.csv")
    budgets = sorted({float(row["budget"]) for row in rows} - {1.0}, reverse=True)
    found = {(row["method"], float(row["budget"])): row for row in rows}
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != "none"]
    cells = [[name, *(_relative(found[name, budget]) for budget in budgets)] for name in methods]
    dense = found["none", 1.0]
    header = ["% of the dense run's answers", *(f"{100 * budget:g} %" for budget in budgets)]
    told = f"Dense: {float(dense['exact']):.3f} exact of {dense['questions']} questions. "
    return told + _measured(dense) + _markdown(header, cells)


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
    rows = _rows("bench/prefill_h200.csv")
    columns = {
        "case": "shape", "method": "method", "batch": "batch", "prefill": "ms",
        "selection": "of it selection", "scoring_share": "of it scoring, %",
        "times": "times faster",
    }  # fmt: skip
    cells = [[row[name] for name in columns] for row in rows]
    return _measured(rows[0]) + _markdown(list(columns.values()), cells)


def _selection() -> str:
    rows = [row for row in _rows("bench/selection_h200.csv") if row["part"].startswith("script")]
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
    return f"{one['device']}, {versions}.\n\n" + _markdown(header, cells)


def _kv_decode() -> str:
    return _kv_attention("kv-decode", ("bf16", "fp8", "int4"))


def _kv_prefill() -> str:
    return _kv_attention("kv-prefill", ("bf16", "sdpa-flash", "fp8", "int4"))


def _kv_attention(op: str, impls: tuple[str, ...]) -> str:
    """Microseconds, and our bf16 kernel's time over each."""
    times: dict[str, dict[str, float]] = {}
    rows = [row for row in _rows("bench/kv_attention_h200.csv") if row["op"] == op]
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
    return f"{one['device']}, {versions}.\n\n" + _markdown(header, cells)


def _quantize_kv() -> str:
    rows = _rows("eval/quantize_kv.csv")
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
    return _markdown(header, cells)


def _quantize_pruning() -> str:
    cells = [
        [
            row["model"], row["kv"], row["method"],
            f"{100 * float(row['budget']):g} %" if row["budget"] else "all",
            f"{row['correct']} of {row['questions']}", f"{100 * float(row['accuracy']):.1f}",
            _points(row["accuracy"], row["dense_accuracy"]),
            _points(row["accuracy"], row["plain_accuracy"]), row["jaccard"],
        ]
        for row in _rows("eval/quantize_pruning.csv")
    ]  # fmt: skip
    header = ["model", "KV", "pruning", "kept", "right", "accuracy, %", "points over unpruned",
              "points over plain", "overlap (Jaccard)"]  # fmt: skip
    return _markdown(header, cells)


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


TABLES: dict[str, Callable[[], str]] = {
    "roles": _roles,
    "accuracy": _accuracy,
    "kv_decode": _kv_decode,
    "kv_prefill": _kv_prefill,
    "offline": _offline,
    "pruning": _pruning,
    "pruning_headlines": _pruning_headlines,
    "prefill": _prefill,
    "selection": _selection,
    "switches_gpu": _switches_gpu,
    "serving": _serving,
    "simulated_shift": _simulated_shift,
    "simulated_shapes": _simulated_shapes,
    "quantize_kv": _quantize_kv,
    "quantize_pruning": _quantize_pruning,
    "real_shift": _real_shift,
    "real_shift_light": _real_shift_light,
}


def rendered(text: str) -> str:
    """`text` with every table written anew."""
    return _REGION.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main() -> int:
    """Write the pages, or with `--check` say whether they are up to date."""
    stale = 0
    for page in PAGES:
        before = page.read_text()
        after = rendered(before)
        stale += before != after
        if "--check" not in sys.argv:
            page.write_text(after)
    return int("--check" in sys.argv and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
