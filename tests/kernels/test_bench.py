"""The benchmarks run, and find every result right, where nothing can be timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


@pytest.mark.parametrize(
    ("script", "cells"),
    [
        ("bench_gemm", 20),
        ("bench_layer", 8),
        ("bench_attention", 3),
        ("bench_kv_attention", 12),
        ("bench_selection", 2),
        ("bench_sampling", 3),
        ("bench_cpu_linear", 8),
    ],
)
def test_dry_run(script, cells, tmp_path):
    done = subprocess.run(
        [sys.executable, BENCH / f"{script}.py", "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("not timed") == cells
    assert not list(tmp_path.iterdir())
