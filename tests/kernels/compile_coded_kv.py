"""Compile the kernels over coded KV for sm_90 and print what their machine code is made of."""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

from compile_for_hopper import LENGTHS, build, describe

from epd_kernels import KVFormat
from epd_kernels.quantized_attention import coded_config
from epd_kernels.warp_decode import WarpConfig, assembly, decode_warps_kernel

attention = importlib.import_module("epd_kernels.quantized_attention")
store = importlib.import_module("epd_kernels.quantized_store")
widened = importlib.import_module("epd_kernels.widened_kv")
scores = importlib.import_module("epd_kernels.fp8_scores")

HEADS = {"GROUP": 4, "HALF": 64, "BLOCK_C": 64, "BLOCK_SIZE": 16, "USE_PTX": True,
         "LIMITED": False}  # fmt: skip


def open_loop(sass: str) -> int:
    """Instructions of the shortest loop with matrix products: tiles that need no mask."""
    labels: dict[str, int] = {}
    products: list[int] = []
    found: list[int] = []
    count = 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.?L\w+):", line):
            labels[label[1]] = count
            continue
        count += line.rstrip().endswith(";")
        if "MMA." in line:
            products.append(count)
        jump = re.search(r"\bBRA\b.*?(\.?L\w+)", line)
        start = labels.get(jump[1], count) if jump else count
        if any(start < at <= count for at in products):
            found.append(count - start)
    return min(found)


def registers_of(sass: str) -> int:
    """Registers of a thread, which are given out by eights."""
    return -(-(1 + max(map(int, re.findall(r"\bR(\d+)\b", sass)))) // 8) * 8


def attention_kernels() -> dict[str, dict[str, Any]]:
    found = {}
    for bits, codes in ((4, "*u8"), (8, "*fp8e4nv")):
        types = {**LENGTHS, "q": "*bf16", "out": "*bf16", "partial": "*fp32", "stats": "*fp32"}
        types |= dict.fromkeys(("k_codes", "v_codes"), codes)
        types |= dict.fromkeys(("k_scales", "v_scales"), "*i32")
        for name, kernel in (
            ("decode", attention._decode_codes_kernel),
            ("prefill", attention._prefill_codes_kernel),
        ):
            decode = name == "decode"
            target = KVFormat.INT4 if bits == 4 else KVFormat.FP8
            config = coded_config(target=target, head_dim=128, rows=4, decode=decode)
            fixed = {**HEADS, "BITS": bits, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
            built = build(kernel, types, fixed, config.num_warps, config.num_stages,
                          registers=config.max_registers)  # fmt: skip
            result = describe(built)
            # a trip of the loop takes block_n keys and values of 128 channels
            lanes = 32 * config.num_warps
            trip = open_loop(built.asm["sass"])
            result["per_element"] = trip * lanes / (config.block_n * 2 * 128)
            # the device sets 1 KiB per program aside
            result["shared"] = config.occupancy * (built.metadata.shared + 1024)
            result["registers"] = config.occupancy * lanes * registers_of(built.asm["sass"])
            found[f"{name}-int{bits}" if bits == 4 else f"{name}-fp8"] = result
    return found


def warp_kernels() -> dict[str, dict[str, Any]]:
    types = {**LENGTHS, "q": "*bf16", "out": "*bf16", "partial": "*fp32", "stats": "*fp32"}
    types |= dict.fromkeys(("k_codes", "v_codes"), "*u8")
    types |= dict.fromkeys(("k_scales", "v_scales"), "*i32")
    config, found = WarpConfig(), {}
    for half in (64, 32):
        fixed = {"BLOCK_SIZE": 16, "GROUP": 4, "HALF": half, "GROUPS": config.groups,
                 "LIMITED": False, **assembly(half // 16)}  # fmt: skip
        built = build(decode_warps_kernel, types, fixed, 1, 1, registers=config.max_registers)
        result = describe(built)
        elements = 16 * config.groups * 4 * half
        result["per_element"] = open_loop(built.asm["sass"]) * 32 / elements
        result["shared"] = config.occupancy * (built.metadata.shared + 1024)
        result["registers"] = config.occupancy * 32 * registers_of(built.asm["sass"])
        found[f"warps-{2 * half}"] = result
    return found


def widening_kernels() -> dict[str, dict[str, Any]]:
    found = {}
    for bits, codes in ((4, "*u8"), (8, "*fp8e4nv")):
        types = {**LENGTHS, "out": "*bf16", "out_stride_kv": "i64"}
        types |= dict.fromkeys(("k_codes", "v_codes"), codes)
        types |= dict.fromkeys(("k_scales", "v_scales"), "*i32")
        fixed = {"BLOCK_SIZE": 16, "BITS": bits, "HALF": 64, "ROWS": 64, "BLOCK_C": 64,
                 "PARTS": 2}  # fmt: skip
        found[f"widen-{bits}"] = describe(build(widened._widen_kernel, types, fixed, 4, 3))
    return found


def score_kernels() -> dict[str, dict[str, Any]]:
    types = {**LENGTHS, "q": "*bf16", "out": "*bf16", "values": "*bf16", "scales": "*fp32",
             "codes": "*fp8e4nv"}  # fmt: skip
    fixed = {"BLOCK_SIZE": 16, "GROUP": 4, "D": 128, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 128,
             "LIMITED": False, "ENCODE": False}  # fmt: skip
    built = build(scores._prefill_fp8_kernel, types, fixed, 8, 3)
    return {"fp8-scores": describe(built)}


def store_kernels() -> dict[str, dict[str, Any]]:
    found = {}
    for bits, codes in ((4, "*u8"), (8, "*fp8e4nv")):
        types = dict.fromkeys(("q", "k", "v", "cos", "sin", "q_norm", "k_norm", "q_out"), "*bf16")
        types |= dict.fromkeys(("k_codes", "v_codes"), codes)
        types |= dict.fromkeys(("k_scales", "v_scales"), "*i32")
        types |= {"factors": "*fp32", "slot_mapping": "*i64", "eps": "fp32"}
        fixed = {"BLOCK_SIZE": 16, "HEADS": 32, "KV_HEADS": 8, "HALF": 64, "BITS": bits,
                 "FLOOR": 1e-8, "NORMED": True, "SMOOTHED": True, "ENCODE": False, "BLOCK_H": 32,
                 "BLOCK_KV": 8, "BLOCK_D": 64}  # fmt: skip
        found[f"store-{bits}"] = describe(build(store._rope_store_kernel, types, fixed, 8, 3))
    return found


if __name__ == "__main__":
    kernels = attention_kernels() | warp_kernels() | widening_kernels() | store_kernels()
    json.dump(kernels | score_kernels(), sys.stdout)
