"""Writes the tables of README.md from the measured files in docs/.

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
README = DOCS.parent / "README.md"
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


def _offline() -> str:
    rows = _rows("bench/offline_h200.csv")
    cells = [
        [
            row["metric"], row["images"], row["batch"], row["requests"], row["output_tokens"],
            f"{row['value']} {row['unit']}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["measure", "images", "batch", "requests", "output tokens", "value"]
    return _measured(rows[0]) + _markdown(header, cells)


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


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": _accuracy,
    "offline": _offline,
    "serving": _serving,
}


def rendered(text: str) -> str:
    """`text` with every table written anew."""
    return _REGION.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main() -> int:
    """Write the README, or with `--check` say whether it is up to date."""
    before = README.read_text()
    after = rendered(before)
    if "--check" in sys.argv:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
