"""Accuracy over budget as a picture. matplotlib is an extra: `pip install epd[plot]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from epd_services.bench_rows import Row
from epd_services.cli.terminal import usage_error
from epd_services.evaluation.methods import DENSE

__all__ = ["check_plotting", "write_plot"]

_CONTROLS = ("random", "uniform_stride", "low_resolution")
_OURS = ("script", "adaptinfer", "script+adaptinfer")


def check_plotting() -> None:
    """Raise `ConfigError` where matplotlib is missing, before anything is computed."""
    if "matplotlib" not in sys.modules and find_spec("matplotlib") is None:
        raise usage_error(
            "Cannot draw a plot.", "matplotlib is not installed.", "pip install 'epd[plot]'"
        )


def write_plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Relative accuracy of every method over the share of tokens that a layer processes."""
    check_plotting()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.add_subplot()
    measured = [row for row in rows if row["method"] != DENSE and not row["note"]]
    names = sorted(dict.fromkeys(row["method"] for row in measured), key=_rank)
    colors = [colormaps[of](number) for of in ("tab20", "tab20b") for number in range(0, 20, 2)]
    for index, name in enumerate(names):
        line = [row for row in measured if row["method"] == name]
        shares = [100 * row["processed_share"] for row in line]
        values = [100 * row["relative"] for row in line]
        low = [max(100 * (row["relative"] - row["relative_low"]), 0.0) for row in line]
        high = [max(100 * (row["relative_high"] - row["relative"]), 0.0) for row in line]
        ours = name.split("[")[0] in _OURS
        axes.errorbar(
            shares, values, yerr=[low, high], label=name, capsize=2,
            marker="osvD^<>Ph*X"[index % 11], markersize=7 if ours else 4,
            linestyle=":" if name in _CONTROLS else "-", linewidth=2.4 if ours else 1.0,
            color=colors[index % len(colors)], zorder=3 if ours else 2,
        )  # fmt: skip
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = sorted({round(100 * row["budget"], 1) for row in measured})
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("vision tokens processed by the average layer, share of all")
    axes.set_ylabel("exact match, % of the dense run (95 % interval)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _rank(name: str) -> tuple[bool, bool, str]:
    return (name.split("[")[0] not in _OURS, name in _CONTROLS, name)
