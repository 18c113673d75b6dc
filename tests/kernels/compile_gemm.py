"""Compile the four-bit GEMMs for sm_90 and print, as JSON, what their machine code is made of."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from compile_for_hopper import build, describe
from machine_code import loop_body, overwritten_operands

from epd_kernels.launch import GemmConfig, gemm_config

gemm = importlib.import_module("epd_kernels.w4_gemm")
widen_16 = importlib.import_module("epd_kernels.w4_widen")
widen = importlib.import_module("epd_kernels.w4_dequant")
folded = importlib.import_module("epd_kernels.w4_folded")
few = importlib.import_module("epd_kernels.w4_few")

WIDTH = 4096
SCHEMES = {
    "u4-bf16": ("u4", "bf16", 128),
    "u4-fp8": ("u4", "fp8e4nv", 128),
    "sm7-fp8": ("sm7", "fp8e4nv", 128),
    "hi4-int8": ("hi4", "i8", 128),
    "hi4-int8-row": ("hi4", "i8", WIDTH),
}
FEW = (("hi4-int8-row", 4), ("hi4-int8-row", 8), ("hi4-int8", 4))
FOLDED = (
    (128, 64, 4, 4, 1), (64, 64, 4, 4, 1), (128, 128, 4, 4, 1), (256, 128, 8, 4, 1),
    (128, 64, 4, 3, 2), (64, 64, 4, 3, 2), (64, 128, 4, 3, 2), (128, 128, 8, 3, 2),
)  # fmt: skip


def widening(code: str) -> dict[str, Any]:
    types = {"data": "*u8", "codes": "*u8"}
    types |= dict.fromkeys(("scales", "zeros", "row_scales"), "*fp32")
    fixed = {"K": WIDTH, "GROUP": 128, "FORMAT": code, "BLOCK_N": widen._BLOCK_N,
             "TILED": True, "USE_PTX": True, "ENCODE": False}  # fmt: skip
    return describe(build(widen._dequantize_kernel, types, fixed, 4, 3, even=("N",)))


def widening_16() -> dict[str, Any]:
    types = {"data": "*u8", "scales": "*fp32", "zeros": "*fp32", "out": "*bf16"}
    fixed = {"K": WIDTH, "WIDTH": WIDTH, "GROUP": 128, "BLOCK_N": 64, "TILED": True}
    return describe(build(widen_16._widen_kernel, types, fixed, 4, 3, even=("N",)))


def product_of(scheme: str, config: GemmConfig, *, tiled: bool = False) -> dict[str, Any]:
    """One GEMM, with the lane-instructions of its loop per weight."""
    code, dtype, group = SCHEMES[scheme]
    types = {"x": f"*{dtype}", "data": "*u8", "bias": "*bf16", "residual": "*bf16", "out": "*bf16",
             "unit": "fp32", "arrivals": "*i32",
             "partial": "*i32" if group == WIDTH else "*fp32"}  # fmt: skip
    types |= dict.fromkeys(("scales", "zeros", "sums", "x_scales"), "*fp32")
    fixed = {
        "K": WIDTH, "GROUP": group, "FORMAT": code, "SPLIT": config.splits > 1, "TILED": tiled,
        "BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "BLOCK_J": 64,
        "STAGES": config.num_stages, "USE_PTX": True, "EARLY": config.early,
        "UNROLL": config.unroll, "ZEROS": scheme == "u4-fp8", "TURNED": config.turned,
        "WGMMA": True,
    }  # fmt: skip
    return _counted(gemm._w4_gemm_kernel, types, fixed, config)


def folded_product(config: GemmConfig) -> dict[str, Any]:
    """The product whose scales are folded into its operand."""
    types = {"x": "*fp8e4nv", "data": "*u8", "tables": "*i32", "residual": "*bf16",
             "out": "*bf16", "arrivals": "*i32", "partial": "*fp32"}  # fmt: skip
    types |= dict.fromkeys(("row_scales", "x_scales"), "*fp32")
    fixed = {
        "bias": None, "residual": None, "K": WIDTH, "SPLIT": config.splits > 1, "TILED": True,
        "BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "STAGES": config.num_stages,
        "USE_PTX": True, "EARLY": config.early, "UNROLL": config.unroll,
        "WGMMA": True,
    }  # fmt: skip
    return _counted(folded._folded_kernel, types, fixed, config)


def few_product(scheme: str, config: GemmConfig) -> dict[str, Any]:
    """The product of a few tokens, by programs of one warp."""
    types = {"x": "*i8", "data": "*u8", "scales": "*fp32", "x_scales": "*fp32", "out": "*bf16",
             "unit": "fp32"}  # fmt: skip
    fixed = {"bias": None, "residual": None, "K": WIDTH, "ROWWISE": scheme == "hi4-int8-row",
             "AHEAD": config.num_stages, "EARLY": config.early}  # fmt: skip
    return _counted(few._few_kernel, types, fixed, config, registers=few._REGISTERS)


def _counted(
    kernel: Any, types: dict[str, str], fixed: dict[str, Any], config: GemmConfig, *,
    registers: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    built = build(
        kernel, types, fixed, config.num_warps, config.num_stages,
        even=("N", "stride_x", "stride_r"), registers=registers,
    )  # fmt: skip
    result = describe(built)
    # one trip of the loop takes 128 inputs of each row, or as many tiles as travel ahead
    steps = config.num_stages if config.num_warps == 1 else config.unroll
    trip = config.block_n * 128 * steps
    result["per_weight"] = result["loop"] * config.num_warps * 32 / trip
    # the last wait of a loop body that loads scales by hand would stall on memory
    result["shared"] = built.metadata.shared
    result["barriers"] = sum(t.startswith("BAR") for t in loop_body(built.asm["sass"]))
    result["loads"] = built.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0].count("tt.load")
    result["overwritten"] = overwritten_operands(built.asm["sass"])
    return result


def all_gemms() -> dict[str, dict[str, Any]]:
    found = {f"dequantize-{code}": widening(code) for code in ("u4", "sm7")}
    found["dequantize-wide"] = widening_16()
    for scheme, tokens in product(SCHEMES, (16, 64, 128)):
        bits = 16 if "bf16" in scheme else 8
        config = gemm_config(torch.device("cpu"), M=tokens, N=WIDTH, K=WIDTH, bits=bits)
        found[f"{scheme}-{tokens}"] = product_of(scheme, config)
    for warps, block_n, tokens in ((4, 64, 16), (4, 128, 64)):
        twice = GemmConfig(block_n, tokens, 1, warps, 3, unroll=2)
        found[f"twice-{tokens}"] = product_of("sm7-fp8", twice, tiled=True)
    found["twice-row"] = product_of("hi4-int8-row", replace(twice, splits=2), tiled=True)
    turned = GemmConfig(64, 16, 1, 4, 5, early=True, turned=True)
    found["turned"] = product_of("sm7-fp8", turned, tiled=True)
    cut = GemmConfig(128, 64, 3, 4, 3, early=True, unroll=2, cut=True)
    found["cut"] = folded_product(cut)
    found["cut-row"] = product_of("hi4-int8-row", cut, tiled=True)
    split = GemmConfig(128, 16, 4, 4, 4, early=True)
    found["split-early"] = product_of("sm7-fp8", split, tiled=True)
    for block_n, tokens, warps, stages, steps in FOLDED:
        config = GemmConfig(block_n, tokens, 1, warps, stages, unroll=steps)
        found[f"folded-{block_n}x{tokens}x{128 * steps}"] = folded_product(config)
    for scheme, ahead in FEW:
        config = GemmConfig(16, 8, 1, 1, ahead, early=True)
        found[f"few-{scheme}-{ahead}"] = few_product(scheme, config)
    return found


if __name__ == "__main__":
    json.dump(all_gemms(), sys.stdout)
