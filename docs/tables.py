"""Writes the tables of README.md and of the pages in docs/ from the measured files there.

With `--check` it fails if they are stale. A table stands between `<!-- table: NAME -->` and `<!--
end -->`.

    python docs/tables.py [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from model_tables import MODEL_TABLES
from table_rows import DOCS, markdown, measured, read

PAGES = (
    DOCS.parent / "README.md", DOCS / "elastic.md", DOCS / "eval/README.md",
    DOCS.parent / "pruning/README.md", DOCS / "quantization.md", DOCS / "admin.md",
)  # fmt: skip
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


_OFFLINE_RUNS = {
    "": "bf16", "pruned_": "Script, 64 of 576", "w4a8_": "W4A8-FP8, INT4 KV", "all_": "all three",
}  # fmt: skip


def _offline() -> str:
    """The runs side by side; each has the same rows."""
    runs = [read(f"bench/offline_{name}h200.csv") for name in _OFFLINE_RUNS]
    told = ["metric", "images", "batch", "requests", "output_tokens"]
    cells = [
        [*(row[name] for name in told), *(same["value"] for same in rows), row["unit"]]
        for row in runs[0]
        for rows in [[_same(run, row, told) for run in runs]]
    ]
    header = ["measure", "images", "batch", "requests", "output tokens",
              *_OFFLINE_RUNS.values(), "unit"]  # fmt: skip
    return "".join(measured(run[0]) for run in runs) + markdown(header, cells)


def _same(run: list[dict[str, str]], row: dict[str, str], told: list[str]) -> dict[str, str]:
    return next(other for other in run if all(other[name] == row[name] for name in told))


def _roles() -> str:
    rows = read("bench/roles_h200.csv")
    columns = {"old": "from", "new": "to", "unload_s": "unload s", "load_s": "load s",
               "resident_gb": "weights then held, GB", "share": "% of all weights"}  # fmt: skip
    cells = [[_rounded(row[name]) for name in columns] for row in rows]
    return measured(rows[0]) + markdown(list(columns.values()), cells)


def _switches_gpu() -> str:
    """What the switches took, then what the requests saw."""
    rows = read("bench/switches_h200.csv")
    columns = {"worker": "worker", "change": "switch", "drain_s": "drain s",
               "unload_s": "unload s", "load_s": "load s", "total_s": "seconds"}  # fmt: skip
    load = {"under": "load", "requests": "requests", "requests_per_s": "answers/s", "lost": "lost",
            "duplicate": "doubled", "wrong": "wrong", "refused": "errors", "retries": "retries",
            "ttft_p50_ms": "TTFT p50 ms", "ttft_p99_ms": "TTFT p99 ms",
            "tpot_p50_ms": "TPOT p50 ms", "tpot_p99_ms": "TPOT p99 ms"}  # fmt: skip
    tables = [
        markdown(list(told.values()),
                  [[_rounded(row[name]) for name in told] for row in rows if row["row"] == kind])
        for kind, told in (("switch", columns), ("load", load))
    ]  # fmt: skip
    return measured(rows[0]) + "\n".join(tables)


def _rounded(value: str) -> str:
    """Seconds to the millisecond; what is no small fraction stays as it is."""
    try:
        return f"{float(value):.3f}" if "." in value and float(value) < 1 else value
    except ValueError:
        return value


def _serving() -> str:
    rows = read("bench/cpu.csv")
    columns = {
        "system": "system", "load": "load", "requests_per_s": "requests/s",
        "ttft_p50_ms": "TTFT p50 ms", "ttft_p99_ms": "TTFT p99 ms",
        "tpot_p50_ms": "TPOT p50 ms", "tpot_p99_ms": "TPOT p99 ms",
        "lost": "lost", "duplicate": "doubled", "wrong": "wrong",
    }  # fmt: skip
    cells = [[row[name] for name in columns] for row in rows]
    return measured(rows[0]) + markdown(list(columns.values()), cells)


def _simulated_shift() -> str:
    return _simulated(_shift_rows())


def _simulated_shapes() -> str:
    return _simulated([row for row in read("bench/elastic.csv") if row["scenario"] != "shift"])


def _shift_rows() -> list[dict[str, str]]:
    return [row for row in read("bench/elastic.csv") if row["scenario"] == "shift"]


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
    return f"`{rows[0]['command']}`, {rows[0]['date']} UTC.\n\n" + markdown(header, cells)


def _real_shift() -> str:
    return _real(read("bench/elastic_real.csv"))


def _real_shift_light() -> str:
    return _real(read("bench/elastic_real_light.csv"))


def _real(rows: list[dict[str, str]]) -> str:
    columns = {
        "policy": "policy", "run": "run", "latency_s": "latency s", "ttft_s": "TTFT s",
        "tpot_ms": "TPOT ms", "seconds": "all answered after s", "lost": "lost", "wrong": "wrong",
        "switches": "switches", "most_per_worker": "most by one",
        "switch_seconds": "a switch took s", "last_split": "ends as",
        "load_average": "load average",
    }  # fmt: skip
    cells = [[row[name] for name in columns] for row in rows]
    return measured(rows[0]) + markdown(list(columns.values()), cells)


TABLES: dict[str, Callable[[], str]] = MODEL_TABLES | {
    "roles": _roles,
    "offline": _offline,
    "switches_gpu": _switches_gpu,
    "serving": _serving,
    "simulated_shift": _simulated_shift,
    "simulated_shapes": _simulated_shapes,
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
