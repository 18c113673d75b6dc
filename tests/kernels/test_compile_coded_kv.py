"""Kernels over coded KV compile for compute capability 9.0 onto the instructions meant for them."""

from __future__ import annotations

from pathlib import Path

CHILD = Path(__file__).with_name("compile_coded_kv.py")


def test_nothing_spills(compiled):
    assert {name: r["spills"] for name, r in compiled.items() if r["spills"]} == {}


def test_prefill_runs_on_wgmma_and_decode_on_sixteen_rows(compiled):
    for target in ("int4", "fp8"):
        prefill, decode = compiled[f"prefill-{target}"], compiled[f"decode-{target}"]
        assert set(prefill["wgmma"]) == {"f16"} and not prefill["mma"]
        assert decode["mma"] and not decode["wgmma"]


def test_decode_instructions_per_element(compiled):
    """Full bandwidth of an H200 leaves 3.9 lane-instructions per four-bit element."""
    assert 1.0 < compiled["decode-int4"]["per_element"] < 3.5
    assert 1.0 < compiled["decode-fp8"]["per_element"] < 4.4


def test_decode_programs_fit_a_multiprocessor(compiled):
    """As many as the launch counts on: 64 Ki registers and 228 KiB of shared memory."""
    for target in ("int4", "fp8"):
        decode = compiled[f"decode-{target}"]
        assert decode["registers"] <= 65536
        assert decode["shared"] <= 228 * 1024


def test_warps_keep_codes_in_registers(compiled):
    """Twelve on a multiprocessor, at under two thirds of the instructions of tiles."""
    for dim, most in ((128, 2.1), (64, 3.2)):
        found = compiled[f"warps-{dim}"]
        assert found["mma"] and not found["wgmma"]
        assert 1.0 < found["per_element"] < most
        assert found["shared"] <= 64 * 1024 and found["registers"] <= 65536


def test_fp8_scores_run_on_the_fp8_unit(compiled):
    """Scores as e4m3, values as bf16, nothing on the older instructions."""
    found = compiled["fp8-scores"]
    assert set(found["wgmma"]) == {"e4m3", "bf16"} and not found["mma"]
