"""Kernels compile for compute capability 9.0 without a GPU, onto the instructions meant for them.

Compilation needs a process in which Triton does not interpret, so one child compiles everything.
"""

from __future__ import annotations

from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("compile_for_hopper.py")


def test_nothing_spills(compiled):
    assert {name: r["spills"] for name, r in compiled.items() if r["spills"]} == {}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_prefill_runs_on_wgmma(compiled, dtype):
    result = compiled[f"prefill-{dtype}"]
    assert result["wgmma"] and not result["mma"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_decode_runs_on_tensor_cores(compiled, dtype):
    """Sixteen rows are too few for wgmma; the older instruction is right here."""
    assert compiled[f"decode-{dtype}"]["mma"]


@pytest.mark.parametrize(
    "name",
    ["cosines", *(f"graph-{step}-{counting}" for step in (1, 2) for counting in (True, False))],
)
def test_similarities_run_on_wgmma(compiled, name):
    assert compiled[name]["wgmma"] and not compiled[name]["mma"]


@pytest.mark.parametrize("dtype", ["fp8e4nv", "i8"])
@pytest.mark.parametrize("name", ["plain", "norm", "silu", "silu-many"])
def test_a_row_is_divided_by_its_reciprocal(name, dtype, compiled):
    """Divisions proper are those of the scale and of its reciprocal, not one per number."""
    result = compiled[f"quantize-{name}-{dtype}"]
    assert result["divisions"] <= 2 and result["waits"] == 1
