"""Compile the kernels of pruning inside the decoder for sm_90; print what they are made of."""

from __future__ import annotations

import json
import sys
from typing import Any

from compile_for_hopper import build, describe

from epd_kernels import row_keep, text_votes

# as on a GPU: the interpreter, where the shape is smaller, does not run here
BLOCK_M, BLOCK_N, WARPS = text_votes.TILE


def all_kernels() -> dict[str, dict[str, Any]]:
    found = {}
    types = {"table": "*i32", "scale_log2": "fp32", "vision": "*u8", "stay": "*u8", "kinds": "*u8",
             "rows": "*i64"}  # fmt: skip
    types |= dict.fromkeys(("lse", "weights", "parts"), "*fp32")
    for dtype, narrow in (("fp16", [(8, 1)]), ("bf16", [])):
        for dim, group in ((128, 1), (128, 7), (64, 4), *narrow):
            mine = types | {"q": f"*{dtype}", "k": f"*{dtype}"}
            tile = {"GROUP": group, "D": dim, "BLOCK_M": BLOCK_M}
            tile |= {"BLOCK_D": text_votes._padded(dim)}
            name = f"{dtype}-{dim}-{group}"
            wide = tile | {"BLOCK_N": BLOCK_N}
            found[f"lse-{name}"] = build(text_votes._lse_kernel, mine, wide, WARPS, 3)
            found[f"prior-{name}"] = build(text_votes._prior_kernel, mine, tile, WARPS, 2)
            wide |= {"HEADS": 4}
            found[f"columns-{name}"] = build(text_votes._columns_kernel, mine, wide, WARPS, 2)
    rank = {"PARTS": 8, "BLOCK": 32, "BLOCK_J": 128}
    found["rank"] = build(row_keep._rank_kernel, types, rank, 4, 3)
    found["gather"] = build(row_keep._gather_kernel, types, {"BLOCK": 256}, 4, 3)
    return {name: describe(built) for name, built in found.items()}


if __name__ == "__main__":
    json.dump(all_kernels(), sys.stdout)
