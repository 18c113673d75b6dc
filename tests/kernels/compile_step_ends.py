"""Compile for sm_90 what begins and ends a step, embedding and draw; print what it is made of."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from compile_for_hopper import build, describe

embed_tokens, launch, ranked_draw, sampling, token_ranks = (
    importlib.import_module(f"epd_kernels.{name}")
    for name in ("embed_tokens", "launch", "ranked_draw", "sampling", "token_ranks")
)
VOCABULARIES = (32_064, 151_936)


def draws() -> dict[str, Any]:
    launched = sampling.draw_config()
    warps = launched.num_warps
    types = dict.fromkeys(("best", "state", "fine", "ranks", "out"), "*i64") | {"logits": "*fp32"}
    types |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "points"), "*fp64")
    found = {}
    for size in VOCABULARIES:
        fixed: dict[str, Any] = {"ID_BITS": size.bit_length(), "CHUNK": launched.chunk}
        wide = fixed | {"CHUNKS": launch.next_power_of_2(-(-size // launched.chunk))}
        found[f"best-{size}"] = build(token_ranks.best_kernel, types, fixed, warps, 3)
        found[f"count-{size}"] = build(token_ranks.count_kernel, types, wide, warps, 3)
        wide |= {"HEAD": launched.head}
        found[f"head-{size}"] = build(token_ranks.head_kernel, types, wide, warps, 3)
        wide |= {"CHUNK": launched.pass_chunk}
        found[f"draw-{size}"] = build(ranked_draw.draw_kernel, types, wide, launched.pass_warps, 3)
    return found


def all_kernels() -> dict[str, dict[str, Any]]:
    found = draws()
    for dtype in ("bf16", "fp16", "fp32"):
        types = dict.fromkeys(("table", "vision", "out"), f"*{dtype}")
        types |= {"ids": "*i64", "sources": "*i32"}
        fixed = {"BLOCK": embed_tokens._BLOCK}
        found[f"embed-{dtype}"] = build(embed_tokens._embed_kernel, types, fixed, 4, 3)
    return {name: describe(built) for name, built in found.items()}


if __name__ == "__main__":
    json.dump(all_kernels(), sys.stdout)
