"""Sorted, deterministic selection: top-k with ties to the lowest index, budgets that add up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epd_kernels.cosines import cosines
from epd_kernels.row_sort import sort_rows
from epd_pruning.errors import PruningError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "at_least_fp32",
    "cosine_matrix",
    "group_sums",
    "keep_count",
    "split_budget",
    "spread",
    "stable_top_k",
    "together",
    "unit_rows",
]


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 where it already is: no score is ever computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of `x` [..., D] with length one; a zero row stays zero."""
    x = at_least_fp32(x)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


def cosine_matrix(x: Tensor, y: Tensor | None = None, *, power: int = 1) -> Tensor:
    """Cosines [N, M] between the rows of `x` and of `y`, or [..., N, N] of `x` itself to a `power`.

    A row's cosine to itself is exactly 1 (0 for a zero row), so that rounding decides no argmax.
    """
    if y is not None:
        return unit_rows(x) @ unit_rows(y).mT
    batched = x if x.dim() == 3 else x[None]
    return cosines(batched, power=power).view(*x.shape[:-1], x.shape[-2])


def together(tensors: Sequence[Tensor]) -> Tensor:
    """`tensors` of one shape as a batch; a single one, or parts of one tensor, are not copied."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    size, base = first.numel(), first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    if first.is_contiguous() and all(
        t.is_contiguous()
        and t.untyped_storage().data_ptr() == storage
        and t.data_ptr() == base + place * size * t.element_size()
        for place, t in enumerate(tensors)
    ):
        return first.as_strided((len(tensors), *first.shape), (size, *first.stride()))
    return torch.stack(list(tensors))


def group_sums(rows: Tensor, home: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums [count, D] of the `rows` [N, D] of each group `home` [N], and group sizes [count].

    A product with the membership matrix, because scattered additions on a GPU come in any order.
    """
    member = (home == torch.arange(count, device=home.device)[:, None]).to(rows.dtype)
    return member @ rows, member.sum(1)


def stable_top_k(scores: Tensor, count: int, *, largest: bool = True) -> Tensor:
    """Indices [..., count] of the best scores, best first; ties to the lowest index, NaN last."""
    rows = scores.reshape(-1, scores.shape[-1])
    return sort_rows(rows, largest=largest)[1].view(scores.shape)[..., :count]


def spread(num_tokens: int, count: int, device: torch.device | None = None) -> Tensor:
    """`count` indices [count], evenly spaced: the middles of equal cells of `num_tokens`."""
    cells = torch.arange(count, device=device)
    return (2 * cells + 1) * num_tokens // (2 * max(count, 1))


def keep_count(num_tokens: int, keep: int | float) -> int:
    """Tokens kept out of `num_tokens`: a count as it is (at most all), a ratio rounded.

    An int is a count, a float a ratio ρ in (0, 1]: k = clamp(round(ρ·N), 1, N), so that the number
    of placeholders is known before the encoder runs. No tokens keep none.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise PruningError("keep", "a count of at least 1 or a ratio in (0, 1]", keep)
    if isinstance(keep, int):
        if keep < 1:
            raise PruningError("keep", "a count of at least 1", keep)
        return min(keep, num_tokens)
    if not 0.0 < keep <= 1.0:
        raise PruningError("keep", "a ratio in (0, 1]", keep)
    return min(max(round(keep * num_tokens), 1), num_tokens)


def split_budget(total: int, sizes: Sequence[int]) -> list[int]:
    """Tokens of each image: proportional to its size, summing to `total` exactly.

    Largest remainders win, ties to the first image. Every image that has tokens keeps at least one,
    so that no block of positions is emptied; none keeps more than it has.
    """
    filled = sum(size > 0 for size in sizes)
    available = sum(sizes)
    if not filled <= total:
        raise PruningError("keep", f"at least {filled}, one token per image", total)
    if total >= available:
        return list(sizes)
    shares = [max(total * size // available, min(size, 1)) for size in sizes]
    while (missing := total - sum(shares)) != 0:
        step = 1 if missing > 0 else -1
        # the image furthest from its exact share moves by one token
        gaps = [
            step * (total * size - available * given) if _may_move(given, size, step) else -math.inf
            for given, size in zip(shares, sizes, strict=True)
        ]
        shares[gaps.index(max(gaps))] += step
    return shares


def _may_move(given: int, size: int, step: int) -> bool:
    return given < size if step > 0 else given > 1
