"""What every pruning method before the LLM shares: two stages, a budget, and one hole to fill.

`prepare` runs once per image on the encoder and never sees a question; `select` runs per request on
what `prepare` let through. A method fills `rank_image`, `rank_query`, or both; budgets, ties,
gathering, validation and the identity live here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from epd_kernels.row_sort import sort_rows
from epd_pruning.errors import PruningError
from epd_pruning.selection import together

__all__ = ["ImagePruner", "Pool", "PruningError", "QueryPruner", "TokenPruner", "VisionInputs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInputs:
    """One image (or one crop) of N vision tokens in raster order, and optionally a question.

    `embeddings` [N, D] projected to the LLM's width; `encoder_states` [N, E] before the projector;
    `encoder_keys` [N, d] head-mean keys and `cls_attention` [N] head-mean attention from CLS, both
    of the encoder layer that is read; `aligned` [N, C] in the text tower's space; `query` [M, C] in
    the same space; `grid` (rows, columns); `seed` of this image for seeded methods.
    """

    embeddings: Tensor
    encoder_states: Tensor | None = None
    encoder_keys: Tensor | None = None
    cls_attention: Tensor | None = None
    aligned: Tensor | None = None
    query: Tensor | None = None
    grid: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.embeddings.dim() != 2:
            shape = tuple(self.embeddings.shape)
            raise PruningError("embeddings", "two-dimensional [N, D]", shape)
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is not None and (value.dim() == 0 or value.shape[0] != self.num_tokens):
                allowed = f"one row for each of {self.num_tokens} tokens"
                raise PruningError(name, allowed, tuple(value.shape))
        if self.query is not None and self.query.dim() != 2:
            raise PruningError("query", "two-dimensional [M, C]", tuple(self.query.shape))
        if self.grid is not None and self.grid[0] * self.grid[1] != self.num_tokens:
            raise PruningError("grid", f"rows and columns of {self.num_tokens} tokens", self.grid)

    @property
    def num_tokens(self) -> int:
        return self.embeddings.shape[0]

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    def require(self, name: str) -> Tensor:
        """The tensor called `name`, or a `PruningError` that names it."""
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise PruningError(name, "given: the method reads it", None)
        return value

    def take(self, rows: Tensor) -> VisionInputs:
        """The same image reduced to `rows`; the grid is gone, everything else follows."""
        present = {name: getattr(self, name) for name in _PER_TOKEN}
        kept = {name: value[rows] for name, value in present.items() if value is not None}
        return replace(self, grid=None, **kept)

    def shapes(self) -> tuple[object, ...]:
        """What images must share to be ranked together: shapes, dtypes, device."""
        present = [(name, getattr(self, name)) for name in (*_PER_TOKEN, "query")]
        return tuple(
            (name, tuple(value.shape), value.dtype, value.device)
            for name, value in present
            if value is not None
        )

    def only(self, names: frozenset[str]) -> VisionInputs:
        """The embeddings and those of the optional per-token tensors that `names` holds."""
        present = {name: getattr(self, name) for name in sorted(names)}
        return VisionInputs(embeddings=self.embeddings, grid=self.grid, seed=self.seed, **present)


_PER_TOKEN = ("embeddings", "encoder_states", "encoder_keys", "cls_attention", "aligned")


@dataclass(frozen=True, slots=True)
class Pool:
    """What the encoder hands on: the tokens that survived the query-agnostic stage.

    `inputs` holds their tensors, P rows in raster order; `indices` [P] int64, increasing, says
    where they stood among the image's `num_tokens`; `rank` [P] int64 is each one's place in the
    order of that stage (None: the stage did not run, the pool is the whole image).
    """

    inputs: VisionInputs
    indices: Tensor
    rank: Tensor | None
    num_tokens: int

    def __len__(self) -> int:
        return self.indices.shape[0]

    def best(self, count: int) -> Pool:
        """The `count` tokens of lowest rank, in raster order: a smaller pool, as if prepared so."""
        if self.rank is None or count == len(self):
            return self
        rows = self.rank.argsort()[:count].sort().values
        return Pool(self.inputs.take(rows), self.indices[rows], self.rank[rows], self.num_tokens)

    def gather(self, keep_indices: Tensor) -> Tensor:
        """The embeddings [k, D] of image positions `keep_indices`, which must be in the pool."""
        if keep_indices.shape[0] == len(self):
            return self.inputs.embeddings
        return self.inputs.embeddings[torch.searchsorted(self.indices, keep_indices)]


@dataclass(frozen=True)
class TokenPruner(ABC):
    """Vision tokens in, `keep_indices` out: sorted, unique, int64, exactly as many as asked for.

    A subclass is a frozen dataclass of hyper-parameters. `prefix` says that the order of
    `rank_image` at a smaller count is a prefix of the larger one; where it is not, a pool serves
    only the budget it was prepared for.
    """

    name: ClassVar[str]
    prefix: ClassVar[bool] = True

    @property
    def image_needs(self) -> frozenset[str]:
        """Per-token tensors besides the embeddings that `rank_image` reads."""
        return frozenset()

    @property
    def query_needs(self) -> frozenset[str]:
        """Per-token tensors besides the embeddings that `rank_query` reads: they travel."""
        return frozenset()

    @abstractmethod
    def pool_size(self, num_tokens: int, num_kept: int) -> int:
        """Tokens that leave the encoder when `num_kept` of `num_tokens` are to survive.

        A cached pool is named by image, fingerprint and this number.
        """

    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor:
        """Indices [≥ count] in order of choice, from the image alone."""
        return torch.arange(inputs.num_tokens, device=inputs.device)

    def rank_query(self, inputs: VisionInputs, num_kept: int) -> Tensor:
        """Indices [≥ num_kept] into `inputs` in order of choice, with `inputs.query` in view."""
        return torch.arange(inputs.num_tokens, device=inputs.device)

    def merge(self, inputs: VisionInputs, order: Tensor, pooled: VisionInputs) -> VisionInputs:
        """`pooled`, the rows of `order` in raster order; a merging method folds the rest in."""
        return pooled

    def macs(self, num_tokens: int, num_kept: int, width: int) -> int:
        """Multiply-accumulates both stages cost for one image of `width`-wide embeddings."""
        return 0

    def rank_images(self, inputs: Sequence[VisionInputs], count: int) -> Tensor:
        """`rank_image` [B, ≥ count] of images of one shape; a batched method does them at once."""
        return torch.stack([self.rank_image(image, count) for image in inputs])

    def rank_queries(self, inputs: Sequence[VisionInputs], num_kept: int) -> Tensor:
        """`rank_query` [B, ≥ num_kept] of pools of one shape, likewise."""
        return torch.stack([self.rank_query(image, num_kept) for image in inputs])

    def prepare(self, inputs: VisionInputs, num_kept: int) -> Pool:
        """The pool of one image, from the image alone; run once, cached, sent.

        With `num_kept` ≥ N nothing is computed and the very tensors given come back.
        """
        return self.prepare_all([inputs], [num_kept])[0]

    def prepare_all(self, images: Sequence[VisionInputs], num_kept: Sequence[int]) -> list[Pool]:
        """`prepare` of each image and its budget; those of one shape and budget go together."""
        for image, count in zip(images, num_kept, strict=True):
            _check_num_kept(count, image.num_tokens)
        pools: dict[int, Pool] = {}
        for members in _alike([(i.shapes(), k) for i, k in zip(images, num_kept, strict=True)]):
            found = self._pools([images[i] for i in members], num_kept[members[0]])
            pools.update(zip(members, found, strict=True))
        return [pools[i] for i in range(len(images))]

    def _pools(self, images: list[VisionInputs], num_kept: int) -> list[Pool]:
        size = images[0].num_tokens
        if num_kept >= size:
            everything = torch.arange(size, device=images[0].device)
            return [Pool(i.only(self.query_needs), everything, None, size) for i in images]
        for need in sorted(self.image_needs | self.query_needs):
            images[0].require(need)
        count = self.pool_size(size, num_kept)
        needed = [image.only(self.image_needs) for image in images]
        order = self.rank_images(needed, count)[:, :count]
        wanted = (len(images), count)
        assert order.shape == wanted and order.dtype == torch.int64, f"{self.name}: bad order"
        indices, rank = sort_rows(order)
        pooled = [image.only(self.query_needs) for image in images]
        if count < size:
            pooled = [
                self.merge(image, own, taken)
                for image, own, taken in zip(needed, order, _take_all(pooled, indices), strict=True)
            ]
        return [Pool(*parts, size) for parts in zip(pooled, indices, rank, strict=True)]

    def select(self, pool: Pool, num_kept: int, *, query: Tensor | None = None) -> Tensor:
        """`keep_indices` [k] into the image for one request; `query` [M, C] where the method asks.

        A pool prepared for a larger budget gives what a cold run at `num_kept` would.
        """
        return self.select_all([pool], [num_kept], queries=[query])[0]

    def select_all(
        self, pools: Sequence[Pool], num_kept: Sequence[int], *, queries: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """`select` of each pool, its budget and its query; alike ones go together."""
        narrow = [self._narrowed(pool, k) for pool, k in zip(pools, num_kept, strict=True)]
        asked = [
            replace(pool.inputs, query=query) for pool, query in zip(narrow, queries, strict=True)
        ]
        chosen: dict[int, Tensor] = {}
        for members in _alike([(i.shapes(), k) for i, k in zip(asked, num_kept, strict=True)]):
            first, count = members[0], num_kept[members[0]]
            if count >= len(narrow[first]):
                chosen.update((i, narrow[i].indices) for i in members)
                continue
            order = self.rank_queries([asked[i] for i in members], count)[:, :count]
            wanted = (len(members), count)
            assert order.shape == wanted and order.dtype == torch.int64, f"{self.name}: bad order"
            places = together([narrow[i].indices for i in members])
            chosen.update(zip(members, places.gather(1, sort_rows(order)[0]), strict=True))
        return [chosen[i] for i in range(len(pools))]

    def prune(self, inputs: VisionInputs, num_kept: int) -> Tensor:
        """`keep_indices` of both stages at once, for one image and its `inputs.query`."""
        return self.select(self.prepare(inputs, num_kept), num_kept, query=inputs.query)

    def _narrowed(self, pool: Pool, num_kept: int) -> Pool:
        """The pool that a cold run at `num_kept` would make of the image."""
        _check_num_kept(num_kept, pool.num_tokens)
        if num_kept >= pool.num_tokens == len(pool):
            return pool
        if pool.rank is None:
            pool = self.prepare(pool.inputs, num_kept)
        wanted = min(self.pool_size(pool.num_tokens, num_kept), pool.num_tokens)
        if wanted == len(pool):
            return pool
        if wanted > len(pool) or not self.prefix:
            allowed = f"the budget of this pool of {len(pool)}, or less" if self.prefix else (
                f"{len(pool)}: a {self.name} pool serves one budget"
            )  # fmt: skip
            raise PruningError("num_kept", allowed, num_kept)
        return pool.best(wanted)


@dataclass(frozen=True)
class ImagePruner(TokenPruner):
    """A query-agnostic method: the encoder decides alone. Fill `rank_image`."""

    def pool_size(self, num_tokens: int, num_kept: int) -> int:
        return min(num_tokens, num_kept)

    @abstractmethod
    def rank_image(self, inputs: VisionInputs, count: int) -> Tensor: ...


@dataclass(frozen=True)
class QueryPruner(TokenPruner):
    """A query-conditioned method: the whole image travels. Fill `rank_query`."""

    def pool_size(self, num_tokens: int, num_kept: int) -> int:
        return num_tokens

    @abstractmethod
    def rank_query(self, inputs: VisionInputs, num_kept: int) -> Tensor: ...


def _check_num_kept(num_kept: int, num_tokens: int) -> None:
    if num_kept < 1 and num_tokens > 0:
        raise PruningError("num_kept", f"in [1, {num_tokens}]", num_kept)


def _alike(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Places of equal `kinds`, group by group."""
    groups: dict[Hashable, list[int]] = {}
    for place, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(place)
    return list(groups.values())


def _take_all(images: Sequence[VisionInputs], rows: Tensor) -> list[VisionInputs]:
    """`take` of images of one shape and their `rows` [B, k]: one gather per kind of tensor."""
    if len(images) == 1:
        return [images[0].take(rows[0])]
    which = torch.arange(len(images), device=rows.device)[:, None]
    kinds = [name for name in _PER_TOKEN if getattr(images[0], name) is not None]
    taken: dict[str, Any] = {
        name: together([getattr(image, name) for image in images])[which, rows].unbind()
        for name in kinds
    }
    return [
        replace(image, grid=None, **{name: rows[place] for name, rows in taken.items()})
        for place, image in enumerate(images)
    ]
