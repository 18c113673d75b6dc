"""The kernels of pruning inside the decoder compile for compute capability 9.0 without a GPU."""

from __future__ import annotations

from pathlib import Path

CHILD = Path(__file__).with_name("compile_text_votes.py")


def test_nothing_spills(compiled):
    assert {name: r["spills"] for name, r in compiled.items() if r["spills"]} == {}


def test_the_map_is_made_on_wgmma(compiled):
    made = {name: r for name, r in compiled.items() if name not in ("rank", "gather")}
    assert len(made) == 21
    assert [name for name, r in made.items() if r["mma"] or not r["wgmma"]] == []
