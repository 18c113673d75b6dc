"""The kernels that begin and end a step compile for compute capability 9.0 without a GPU."""

from __future__ import annotations

from pathlib import Path

CHILD = Path(__file__).with_name("compile_step_ends.py")


def test_nothing_spills(compiled):
    assert len(compiled) == 11
    assert {name: r["spills"] for name, r in compiled.items() if r["spills"]} == {}
