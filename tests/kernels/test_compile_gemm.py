"""Four-bit GEMMs compile for compute capability 9.0 onto the instructions meant for them."""

from __future__ import annotations

from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("compile_gemm.py")
KINDS = {
    "u4-bf16": "bf16", "u4-fp8": "e4m3", "sm7-fp8": "e4m3", "hi4-int8": "s8", "hi4-int8-row": "s8",
}  # fmt: skip


def test_nothing_spills(compiled):
    assert {name: r["spills"] for name, r in compiled.items() if r["spills"]} == {}


@pytest.mark.parametrize("tokens", [16, 64, 128])
@pytest.mark.parametrize("scheme", KINDS)
def test_products_run_on_wgmma_of_their_type(compiled, scheme, tokens):
    """Even 16 tokens: weights are the wide operand. Nothing is widened to another type."""
    result = compiled[f"{scheme}-{tokens}"]
    assert not result["mma"]
    assert set(result["wgmma"]) == {KINDS[scheme]}


@pytest.mark.parametrize("tokens", [16, 64, 128])
@pytest.mark.parametrize("scheme", KINDS)
def test_the_loop_waits_for_no_plain_load(compiled, scheme, tokens):
    """Weights, activations, scales and sums all travel ahead of their use."""
    assert compiled[f"{scheme}-{tokens}"]["loads"] == 0


@pytest.mark.parametrize(
    ("scheme", "tokens", "limit"),
    [
        ("sm7-fp8", 16, 1.7),
        ("sm7-fp8", 64, 2.2),
        ("u4-fp8", 16, 1.8),
        ("u4-fp8", 64, 3.3),
        ("hi4-int8", 16, 1.6),
        ("hi4-int8", 64, 2.5),
        ("hi4-int8-row", 16, 1.2),
        ("hi4-int8-row", 64, 1.4),
    ],
)
def test_instructions_per_weight(compiled, scheme, tokens, limit):
    """Decode issues well under the 3.9 lane-instructions per weight that full bandwidth allows."""
    assert 0.5 < compiled[f"{scheme}-{tokens}"]["per_weight"] < limit


@pytest.mark.parametrize(("tokens", "limit"), [(16, 2.0), (64, 1.9)])
def test_two_steps_per_trip(compiled, tokens, limit):
    result = compiled[f"twice-{tokens}"]
    assert set(result["wgmma"]) == {"e4m3"} and not result["loads"]
    assert result["per_weight"] < limit


def test_split_products_can_start_early(compiled):
    assert set(compiled["split-early"]["wgmma"]) == {"e4m3"}


@pytest.mark.parametrize(("name", "kind"), [("cut", "e4m3"), ("cut-row", "s8")])
def test_cut_products(compiled, name, kind):
    assert set(compiled[name]["wgmma"]) == {kind} and not compiled[name]["loads"]


def test_turning_costs_little(compiled):
    result = compiled["turned"]
    assert set(result["wgmma"]) == {"e4m3"} and not result["loads"]
    assert result["per_weight"] < 2.4


def test_no_operand_is_overwritten_while_a_product_reads_it(compiled):
    found = {name: r["overwritten"] for name, r in compiled.items() if "overwritten" in r}
    assert len(found) > 15
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("tile", "limit"),
    [
        ("128x64x128", 2.4),
        ("64x64x128", 3.0),
        ("128x128x128", 2.4),
        ("256x128x128", 2.4),
        ("128x64x256", 2.3),
        ("64x64x256", 2.8),
        ("64x128x256", 3.0),
        ("128x128x256", 2.9),
    ],
)
def test_folded_products(compiled, tile, limit):
    result = compiled[f"folded-{tile}"]
    assert set(result["wgmma"]) == {"e4m3"} and not result["mma"] and not result["loads"]
    assert 0.5 < result["per_weight"] < limit


@pytest.mark.parametrize(
    ("name", "limit"), [("hi4-int8-row-4", 0.9), ("hi4-int8-row-8", 0.9), ("hi4-int8-4", 1.3)]
)
def test_single_warps_share_nothing(compiled, name, limit):
    """No shared memory, no barrier in the loop, and few instructions."""
    result = compiled[f"few-{name}"]
    assert not result["shared"] and not result["barriers"] and result["mma"]
    assert 0.5 < result["per_weight"] < limit
