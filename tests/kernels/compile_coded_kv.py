"""Compile the kernels over coded KV for sm_90 and print what their machine code is made of."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from compile_for_hopper import LENGTHS, build, describe

from epd_kernels.quantized_attention import coded_config

attention = importlib.import_module("epd_kernels.quantized_attention")
store = importlib.import_module("epd_kernels.quantized_store")

HEADS = {"GROUP": 4, "HALF": 64, "BLOCK_C": 64, "BLOCK_SIZE": 16, "USE_PTX": True}


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
            config = coded_config(head_dim=128, rows=4, decode=decode)
            fixed = {**HEADS, "BITS": bits, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
            if decode:
                fixed["SPLITS"] = 8
            result = describe(build(kernel, types, fixed, config.num_warps, config.num_stages))
            # a trip of the loop takes block_n keys and values of 128 channels
            lanes = 32 * config.num_warps
            result["per_element"] = result["loop"] * lanes / (config.block_n * 2 * 128)
            found[f"{name}-int{bits}" if bits == 4 else f"{name}-fp8"] = result
    return found


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
    json.dump(attention_kernels() | store_kernels(), sys.stdout)
