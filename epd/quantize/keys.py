"""Scaling keys so that four bits hold them: pairs before, single channels after the rotation.

Multiplying channels of k by f and dividing those of q by f changes no score. The two channels of a
rotary pair that share one f commute with the rotation, so such factors are merged into the
projections. After FireQ (arXiv 2505.20839), with m the largest length of a pair over the tokens,

    before RoPE:  f = m ^ -gamma per pair, in the rows of k_proj, 1 / f in those of q_proj
    after RoPE:   the `top` largest channels and their partners leave that and are brought, each by
                  its own factor, to the size of the others; applied online

FireQ has gamma = 1 and top = 8; here both are searched per layer, beginning with none. Where keys
are normed behind the projection nothing can be merged, and all factors are applied online.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from epd.kv.gate import coded
from epd.quantize.block import attend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from epd.quantize.block import Block, Sequences
    from epd_kernels import KVFormat

__all__ = ["scale_keys"]

_GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_TOPS = (0, 2, 4, 8)


def scale_keys(
    block: Block, x: torch.Tensor, sequences: Sequences, target: KVFormat
) -> dict[str, Any]:
    """What was chosen and its error; merges pair factors into `block` and sets its `kv_factors`.

    `x [T, hidden]` is what qkv reads. The error is that of attention over keys and values in codes
    of `target`, against plain ones.
    """
    q, k, v = block.queries_keys_values(block.linear("qkv", x), sequences)
    wanted = attend(q, k, v, sequences)

    def error(factors: torch.Tensor) -> float:
        found = attend(q, *coded(k, v, target, factors), sequences)
        return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))

    measured = [
        (error(pairs * singles), gamma, top, pairs, singles)
        for gamma, top, pairs, singles in _candidates(k)
    ]
    before = measured[0][0]
    after, gamma, top, pairs, singles = min(measured, key=lambda item: item[0])
    if block.config.qk_norm:
        block.kv_factors = pairs * singles
    else:
        _merge(block, pairs)
        block.kv_factors = singles if top else None
    return {"gamma": gamma, "top": top, "before": before, "after": after}


def _candidates(k: torch.Tensor) -> Iterator[tuple[float, int, torch.Tensor, torch.Tensor]]:
    """(gamma, top, pair factors, single factors), the factors `[Hkv, D]`."""
    half = k.shape[-1] // 2
    lengths = _floored((k[..., :half].square() + k[..., half:].square()).sqrt().amax(0))
    largest = _floored(k.abs().amax(0))
    for gamma, top in product(_GAMMAS, _TOPS):
        if top > half // 2:
            continue
        pairs = lengths.pow(-gamma)
        pairs = (pairs / pairs.log().mean(-1, keepdim=True).exp()).repeat(1, 2)
        singles = torch.ones_like(pairs)
        if top:
            chosen = torch.zeros_like(largest, dtype=torch.bool)
            chosen.scatter_(-1, largest.topk(top, dim=-1).indices, True)
            chosen |= chosen.roll(half, dims=-1)
            scaled = (largest * pairs).masked_fill(chosen, float("nan"))
            level = scaled.nanmedian(-1, keepdim=True).values
            pairs = torch.where(chosen, torch.ones_like(pairs), pairs)
            singles = torch.where(chosen, level / largest, singles)
        yield gamma, top, pairs, singles


def _floored(values: torch.Tensor) -> torch.Tensor:
    """Never so small, beside the head's mean, that a factor runs away."""
    return values.clamp(min=1e-12).maximum(1e-3 * values.mean(-1, keepdim=True))


def _merge(block: Block, pairs: torch.Tensor) -> None:
    """Multiply the rows of keys by `pairs [Hkv, D]`, divide those of the queries that meet them."""
    group = block.config.num_heads // block.config.num_kv_heads
    rows = {"k": pairs.flatten(), "q": (1 / pairs).repeat_interleave(group, dim=0).flatten()}
    for name, factors in rows.items():
        for kind in ("weight", "bias"):
            key = f"self_attn.{name}_proj.{kind}"
            if key in block.tensors:
                shaped = factors[:, None] if kind == "weight" else factors
                block.tensors[key] = block.tensors[key] * shaped
