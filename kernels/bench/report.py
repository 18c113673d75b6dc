"""Turn measured GEMMs into a table and a plot: `python report.py RESULTS.csv`.

Where a file holds a cell twice the later row counts. The table has, for each shape and token count,
microseconds of each implementation and how many times as fast as the vendor's bf16 product it is;
cells slower than bf16 are in italics. The plot is a roofline: operations per second over operations
per byte, each implementation with the bytes it counts, under the roofs of the run.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path
from typing import Any

Row = dict[str, str]
COLUMNS = {
    "bf16": "bf16", "fp8-fast": "FP8", "w4a8-fp8-tiled": "W4A8-FP8",
    "w4a8-fp8-folded-tiled": "W4A8-FP8, folded", "w4a8-fp8-widened": "W4A8-FP8, widened",
    "w4a8-int8-channel-tiled": "W4A8-INT8, per row", "w4a8-int8-group-tiled": "W4A8-INT8, groups",
    "w4a16": "W4A16", "w4a16-widened": "W4A16, widened",
}  # fmt: skip
# a first measurement had these under other names
OLDER = {
    "fp8-fast": "fp8", "w4a8-int8-channel-tiled": "w4a8-int8-channel",
    "w4a8-int8-group-tiled": "w4a8-int8-group",
}  # fmt: skip
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LAYERS = 32
BLOCKS = ("ffn", "decode", "prefill")
PLOTTED = ("22016x4096", "28672x4096")


def cells(path: Path) -> dict[tuple[str, str, str], Row]:
    """The last row of each (op, implementation, shape)."""
    with path.open(newline="") as file:
        return {(r["op"], r["impl"], r["shape"]): r for r in csv.DictReader(file)}


def shapes(rows: dict[tuple[str, str, str], Row]) -> dict[str, dict[int, dict[str, Row]]]:
    """Rows of products by weight shape, token count and implementation."""
    found: dict[str, dict[int, dict[str, Row]]] = {}
    for (op, impl, shape), row in rows.items():
        if op == "gemm" and (match := re.fullmatch(r"M=(\d+) N=(\d+) K=(\d+)", shape)):
            m, n, k = map(int, match.groups())
            found.setdefault(f"{n}x{k}", {}).setdefault(m, {})[impl] = row
    return found


def _cell(told: dict[str, Row], impl: str) -> str:
    row = told.get(impl) or told.get(OLDER.get(impl, ""))
    if row is None:
        return ""
    micros, base = float(row["p50_us"]), float(told["bf16"]["p50_us"])
    text = f"{micros:.{1 if micros < 100 else 0}f}"
    if impl == "bf16":
        return text
    ratio = f"{text} ({base / micros:.2f}x)"
    return ratio if micros <= base else f"*{ratio}*"


def table(rows: dict[tuple[str, str, str], Row]) -> str:
    """Markdown, a row per weight shape and token count."""
    lines = ["| N x K | tokens | " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|" + " --- |" * (len(COLUMNS) + 2))
    for shape, counts in shapes(rows).items():
        for m, told in sorted(counts.items()):
            if "bf16" in told:
                found = " | ".join(_cell(told, impl) for impl in COLUMNS)
                lines.append(f"| {shape.replace('x', ' x ')} | {m} | {found} |")
    return "\n".join(lines)


def layers(path: Path) -> str:
    """Markdown of what bench_layer.py wrote: a row per block, a column per scheme."""
    rows = cells(path) if path.is_file() else {}
    schemes = list(dict.fromkeys(impl for op, impl, _ in rows if op in BLOCKS))
    found_blocks = dict.fromkeys((op, shape) for op, _, shape in rows if op in BLOCKS)
    blocks = sorted(found_blocks, key=lambda block: BLOCKS.index(block[0]))
    lines = ["| block | " + " | ".join(schemes) + " |", "|" + " --- |" * (len(schemes) + 1)]
    for op, shape in blocks:
        found = [_block(rows, op, impl, shape) for impl in schemes]
        lines.append(f"| {op} {shape} | " + " | ".join(found) + " |")
    return "\n".join(lines) if blocks else "Not measured yet."


def parts(path: Path) -> str:
    """Markdown of the parts of those blocks: a row per block and scheme, a column per part."""
    rows = cells(path) if path.is_file() else {}
    tables = []
    for block in BLOCKS:
        names = list(dict.fromkeys(op for op, _, _ in rows if op.startswith(f"{block}: ")))
        lines = [f"| {block} | scheme | " + " | ".join(n.partition(": ")[2] for n in names)]
        lines[0] += " | sum | whole |"
        lines.append("|" + " --- |" * (len(names) + 4))
        for op, impl, shape in rows:
            if op == block and (names and (names[0], impl, shape) in rows):
                times = [float(rows[name, impl, shape]["p50_us"]) for name in names]
                told = [*times, sum(times), float(rows[op, impl, shape]["p50_us"])]
                cells_told = " | ".join(f"{time:.1f}" for time in told)
                lines.append(f"| {shape} | {impl} | {cells_told} |")
        if names:
            tables.append("\n".join(lines))
    return "\n\n".join(tables) or "Not measured yet."


def _block(rows: dict[tuple[str, str, str], Row], op: str, impl: str, shape: str) -> str:
    row, base = rows.get((op, impl, shape)), rows.get((op, "bf16", shape))
    if row is None or base is None:
        return ""
    micros = float(row["p50_us"])
    text = f"{micros:.1f} us ({float(base['p50_us']) / micros:.2f}x)"
    if match := re.match(r"(\d+)x(\d+) ", shape):
        rate = int(match[1]) * int(match[2]) / (LAYERS * micros * 1e-6)
        text += f", {rate:,.0f} tokens/s"
    return text


def plot(rows: dict[tuple[str, str, str], Row], path: Path) -> None:
    """The roofline of `PLOTTED` as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PLOTTED), figsize=(13, 5.6), sharey=True)
    found = shapes(rows)
    for axis, shape in zip(axes, PLOTTED, strict=True):
        _roofs(axis, rows)
        for (impl, label), marker in zip(COLUMNS.items(), "osD^<vPX*", strict=True):
            points = [
                (float(row["tflops"]) / float(row["tb_per_s"]), float(row["tflops"]), m)
                for m, told in sorted(found.get(shape, {}).items())
                if (row := told.get(impl) or told.get(OLDER.get(impl, "")))
            ]
            if points:
                x, y, _ = zip(*points, strict=True)
                axis.plot(x, y, marker=marker, ms=5, lw=1, label=label)
        axis.set(xscale="log", yscale="log", title=f"{shape.replace('x', ' x ')}, tokens 1 to 8192",
                 xlabel="operations per byte", xlim=(1, 8000), ylim=(2, 2500))  # fmt: skip
        axis.grid(alpha=0.3, which="both", lw=0.4)
    axes[0].set_ylabel("Tops/s")
    axes[0].legend(loc="lower right", fontsize=8)
    device = next(iter(rows.values()))
    figure.suptitle(f"{device['device']}, torch {device['torch']}, Triton {device['triton']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _roofs(axis: Any, rows: dict[tuple[str, str, str], Row]) -> None:
    """Diagonal of bytes, horizontals of operations, where the file tells them."""
    copied = rows.get(("roof", "copy", ""))
    rate = float(copied["tb_per_s"]) if copied else None
    for kind, style in (("bf16", "--"), ("fp8", "-")):
        row = rows.get(("roof", kind, ""))
        if row and rate:
            top = float(row["tflops"])
            axis.plot([1, top / rate, 8000], [rate, top, top], color="black", ls=style, lw=1)
            axis.text(7500, top * 1.04, f"{kind} {top:.0f} Tops/s", ha="right", fontsize=8)
    if rate:
        axis.text(1.15, 2.3 * rate, f"copy {rate:.2f} TB/s", rotation=46, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--layers", type=Path, help="what bench_layer.py wrote")
    parser.add_argument("--page", type=Path, help="a page whose regions take the tables")
    args = parser.parse_args()
    rows = cells(args.results)
    texts = {"gemm": table(rows)}
    if args.layers:
        texts |= {"layers": layers(args.layers), "parts": parts(args.layers)}
    if args.page:
        page = args.page.read_text()
        args.page.write_text(
            _REGION.sub(lambda m: f"{m[1]}\n{texts.get(m[2], '')}\n\n{m[3]}", page)
        )
    else:
        print("\n\n".join(texts.values()))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
