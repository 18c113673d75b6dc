"""Compile the kernels for sm_90 and print, as JSON, what their machine code is made of."""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = (
    "paged_attention", "norm", "rope", "silu_mul", "kv_store", "activations", "fused_quant",
    "launch", "position_splits",
)  # fmt: skip
attention, norm, rope, silu_mul, kv_store, activations, fused, launch, splits = (
    importlib.import_module(f"epd_kernels.{name}") for name in MODULES
)
LENGTHS = {"block_tables": "*i32", "cu_seqlens_q": "*i32", "seq_lens": "*i32", "limits": "*i32",
           "scale_log2": "fp32"}  # fmt: skip


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int, *,
    even: tuple[str, ...] = ("D",), registers: int | None = None,
):  # fmt: skip
    """`kernel` compiled with every pointer, stride and argument in `even` a multiple of 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or "stride" in n or (n in even and signature[n] == "i32")
    }
    fixed = {(names.index(n),): value for n, value in constants.items()}
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    source = ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def loop_length(sass: str) -> int:
    """Instructions in the longest body of a backward jump."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.?L\w+):", line):
            labels[label[1]] = count
            continue
        count += line.rstrip().endswith(";")
        jump = re.search(r"\bBRA\b.*?(\.?L\w+)", line)
        if jump and jump[1] in labels:
            longest = max(longest, count - labels[jump[1]])
    return longest


def describe(built: Any) -> dict[str, Any]:
    ptx, sass = built.asm["ptx"], built.asm["sass"]
    kinds = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k\d+\.\w+\.(\w+)", ptx)
    return {
        "wgmma": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loop": loop_length(sass),
    }


def all_kernels() -> dict[str, dict[str, Any]]:
    found = {}
    for dtype in ("fp16", "bf16"):
        p = f"*{dtype}"
        types = {**LENGTHS, "q": p, "k_cache": p, "v_cache": p, "out": p,
                 "partial": "*fp32", "stats": "*fp32"}  # fmt: skip
        tile = {"BLOCK_SIZE": 16, "GROUP": 4, "D": 128, "BLOCK_N": 64, "BLOCK_D": 128,
                "LIMITED": False}  # fmt: skip
        fixed = {**tile, "BLOCK_M": 128, "SPLIT": False}
        prefill = build(attention._prefill_kernel, types, fixed, 8, 3)
        found[f"prefill-{dtype}"] = describe(prefill)
        tile |= {"BLOCK_M": 16, "BLOCK_N": 32}
        decode = build(attention._decode_kernel, types, tile, 1, 2)
        found[f"decode-{dtype}"] = describe(decode)
    combine = {"D": 128, "BLOCK_D": 128, "BLOCK_S": 16, "BY_TOKEN": False}
    types = {"partial": "*fp32", "stats": "*fp32", "out": "*bf16", "cu_seqlens_q": "*i32"}
    found["combine"] = describe(build(splits._combine_kernel, types, combine, 4, 3))
    found |= elementwise() | quantisers() | selection()
    return found


def elementwise() -> dict[str, dict[str, Any]]:
    def pointers(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "*bf16")

    row = {"D": 4096, "BLOCK_D": 4096, "HAS_RESIDUAL": True}
    heads = {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "BLOCK_H": 32, "BLOCK_KV": 8, "BLOCK_D": 64}
    store = {"HEADS": 8, "D": 128, "BLOCK_H": 8, "BLOCK_D": 128}
    caches = {**pointers("k", "v", "k_cache", "v_cache"), "slot_mapping": "*i64"}
    norms = {**pointers("x", "residual", "weight", "out", "total"), "eps": "fp32"}
    angles = pointers("q", "k", "cos", "sin", "q_out", "k_out")
    return {
        "rms_norm": describe(build(norm._rms_norm_kernel, norms, row, 8, 3)),
        "rope": describe(build(rope._rope_kernel, angles, heads, 8, 3)),
        "silu_mul": describe(
            build(silu_mul._silu_mul_kernel, pointers("gate_up", "out"), {"BLOCK": 1024}, 4, 3)
        ),
        "store_kv": describe(build(kv_store._store_kv_kernel, caches, store, 2, 3)),
    }


def quantisers() -> dict[str, dict[str, Any]]:
    found = {}
    for dtype, largest in (("fp8e4nv", 448.0), ("i8", 127.0)):
        types = {"codes": f"*{dtype}", "scales": "*fp32", "eps": "fp32"}
        types |= dict.fromkeys(("x", "residual", "weight", "total", "gate_up"), "*bf16")
        eight = {"LARGEST": largest, "FLOOR": 1e-12, "ENCODE": False, "EARLY": True, "OPENS": True}
        row, inner = {"K": 4096, "BLOCK_K": 2048}, {"K": 14336, "BLOCK_K": 2048}
        for name, kernel, fixed in (
            ("plain", activations._quantize_kernel, row),
            ("norm", fused._norm_quant_kernel, {**row, "HAS_RESIDUAL": True}),
            ("silu", fused._silu_quant_kernel, inner),
            ("silu-many", fused._silu_quant_kernel, {**inner, "BLOCK_K": 4096}),
        ):
            built = build(kernel, types, {**eight, **fixed}, fixed["BLOCK_K"] // 256, 3)
            found[f"quantize-{name}-{dtype}"] = describe(built) | {
                "divisions": len(re.findall(r"\bFCHK\b", built.asm["sass"])),
                "waits": len(re.findall(r"griddepcontrol\.wait", built.asm["ptx"])),
            }
    return found


def selection() -> dict[str, dict[str, Any]]:
    graph, cosines, relevance, sorting, dpp = (
        importlib.import_module(f"epd_kernels.{name}")
        for name in ("graph_score", "cosines", "relevance", "row_sort", "greedy_dpp")
    )

    def floats(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "*fp32")

    tile = {"BLOCK": 64, "BLOCK_D": 128}
    sums = {**floats("inverse", "tau", "row_sums", "column_sums"), "x": "*bf16",
            "histogram": "*i32"}  # fmt: skip
    found = {
        f"graph-{step}-{counting}": build(
            graph._graph_kernel, sums, {**tile, "STEP": step, "HISTOGRAM": counting, "BINS": 2048},
            8 if counting else 4, 3,
        )
        for step in (1, 2)
        for counting in (True, False)
    }  # fmt: skip
    types = {**floats("inverse", "out"), "x": "*bf16"}
    found["cosines"] = build(cosines._cosine_kernel, types, tile, 4, 3)
    found["norms"] = build(
        graph._norm_kernel, {"x": "*bf16", "inverse": "*fp32"}, {"BLOCK_D": 1024}, 4, 3
    )
    types = {"histogram": "*i32", "tau": "*fp32", "quantile": "fp32"}
    found["threshold"] = build(graph._threshold_kernel, types, {"BINS": 2048}, 4, 3)
    types = floats("sums", "tau", "score")
    types |= dict.fromkeys(("compared", "min_degree", "gamma"), "fp32")
    found["score"] = build(graph._score_kernel, types, {"BLOCK": 64}, 2, 3)
    for kind in ("fp32", "i64"):
        types = {"x": f"*{kind}", "values": f"*{kind}", "indices": "*i64"}
        fixed = {"LARGEST": False, "FLOATING": kind == "fp32", "BLOCK": 32, "BLOCK_J": 128}
        found[f"sort-{kind}"] = build(sorting._sort_kernel, types, fixed, 4, 3)
    types = {"tokens": "*bf16", "query": "*bf16", "raw": "*fp32", "sign": "fp32"}
    fixed = {"BLOCK": 8, "BLOCK_C": 512}
    found["to-query"] = build(relevance._cosine_to_query_kernel, types, fixed, 4, 3)
    types = {**floats("raw", "out"), "weight": "fp32"}
    found["shape"] = build(relevance._shape_kernel, types, {"BLOCK": 1024}, 8, 3)
    types = {**floats("similarity", "relevance", "factors", "gains"), "indices": "*i64",
             "eps": "fp32"}  # fmt: skip
    for size in (231, 576, 1152, 2880):
        block, rows, warps = dpp.dpp_config(size)
        fixed = {"BLOCK_N": block, "BLOCK_T": rows}
        found[f"dpp-{size}"] = build(dpp._greedy_dpp_kernel, types, fixed, warps, 3)
    return {name: describe(built) for name, built in found.items()}


if __name__ == "__main__":
    json.dump(all_kernels(), sys.stdout)
