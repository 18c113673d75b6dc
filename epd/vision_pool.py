"""Pruning before the LLM in two halves: `make_pools` on the encoder, `TokenSelector` at prefill.

What lies between them, in the cache and on the wire, is a list of tensors: the vision tokens of the
pool [P, hidden]; and unless those are the whole image, int32 vectors of their places in the image
[P] and in the order of the encoder's stage [P], the image's token count [1], and the per-token
tensors that the choice by the question reads, in the order of their names.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from epd.errors import InvalidRequestError, WireError
from epd.pruning_spec import PruningSpec, count_of
from epd.step import KeptTokens, NewSequence
from epd_pruning.base import Pool, PruningError, TokenPruner, VisionInputs

if TYPE_CHECKING:
    import numpy as np

    from epd.models.query import QueryEncoder

__all__ = [
    "ImageEncoder",
    "TokenSelector",
    "blank_pool",
    "check_pruning",
    "make_pools",
    "pruned",
]

_PLACES = 3


class ImageEncoder(Protocol):
    """uint8 [height, width, 3] images in, vision tokens and what lies inside the encoder out."""

    def num_tokens(self, width: int, height: int) -> int:
        """Vision tokens of an image."""

    def encode_inputs(
        self, images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], needs: frozenset[str]
    ) -> list[VisionInputs]:
        """One per image, with the optional tensors that `needs` names."""

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raise `InvalidRequestError` for what the encoder cannot give."""


def check_pruning(
    spec: PruningSpec, encoder: ImageEncoder | None, queries: QueryEncoder | None
) -> None:
    """Raise `InvalidRequestError` if a worker with these cannot do what `spec` asks."""
    pruner = spec.pruner()
    if pruner is None:
        return
    if encoder is not None:
        encoder.check_needs(pruner.image_needs | pruner.query_needs)
    if queries is not None and (kind := getattr(pruner, "query_encoder", None)) is not None:
        queries.encode(kind, "")


def make_pools(
    encoder: ImageEncoder,
    images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]],
    specs: Sequence[PruningSpec | None],
    names: Sequence[str],
) -> list[list[torch.Tensor]]:
    """What the encoder hands on of each image, encoded as one batch.

    A budget that keeps a whole image runs no pruner. `names` are the images' digests, the seeds of
    seeded methods. Raises `InvalidRequestError` for a spec that cannot be done here.
    """
    sizes = [encoder.num_tokens(image.shape[1], image.shape[0]) for image in images]
    pruners = [
        spec.pruner() if spec is not None and spec.num_kept(size) < size else None
        for spec, size in zip(specs, sizes, strict=True)
    ]
    needs = [p.image_needs | p.query_needs for p in pruners if p is not None]
    inputs = encoder.encode_inputs(images, frozenset().union(*needs))
    pools = [[image.embeddings] for image in inputs]
    together: dict[TokenPruner, list[int]] = {}
    for place, pruner in enumerate(pruners):
        if pruner is not None:
            together.setdefault(pruner, []).append(place)
    for pruner, places in together.items():
        seeded = [dataclasses.replace(inputs[i], seed=_seed(names[i])) for i in places]
        counts = [spec.num_kept(sizes[i]) for i in places if (spec := specs[i]) is not None]
        try:
            made = pruner.prepare_all(seeded, counts)
        except PruningError as error:
            raise _refusal(error) from None
        for place, pool in zip(places, made, strict=True):
            pools[place] = _packed(pool, pruner)
    return pools


def _seed(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)


def _packed(pool: Pool, pruner: TokenPruner) -> list[torch.Tensor]:
    if pool.rank is None:
        return [pool.inputs.embeddings]
    size = torch.tensor([pool.num_tokens], dtype=torch.int32)
    return [
        pool.inputs.embeddings,
        pool.indices.to(torch.int32),
        pool.rank.to(torch.int32),
        size,
        *(pool.inputs.require(name) for name in sorted(pruner.query_needs)),
    ]


def blank_pool(
    spec: PruningSpec, num_tokens: int, *, hidden_size: int, dtype: torch.dtype,
    device: torch.device, queries: QueryEncoder,
) -> list[torch.Tensor]:  # fmt: skip
    """What an encoder would hand on for `spec` of an image of `num_tokens`, the tokens random."""
    pruner = spec.pruner()
    assert pruner is not None
    generator = torch.Generator(device).manual_seed(0)

    def rows(width: int) -> torch.Tensor:
        shape = (pruner.pool_size(num_tokens, spec.num_kept(num_tokens)), width)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    beside: dict[str, Any] = {}
    if "aligned" in pruner.query_needs:
        beside["aligned"] = rows(queries.encode("clip_text", "a").shape[1])
    inputs = VisionInputs(embeddings=rows(hidden_size), **beside)
    places = torch.arange(inputs.num_tokens, device=device)
    return _packed(Pool(inputs, places, places, num_tokens), pruner)


def _unpacked(tensors: Sequence[torch.Tensor], pruner: TokenPruner) -> Pool:
    """The pool that `_packed` took apart. Raises `WireError` when it cannot be one of `pruner`."""
    names = sorted(pruner.query_needs)
    if len(tensors) != 1 + _PLACES + len(names):
        raise WireError("a pool has the wrong number of tensors")
    embeddings, indices, rank, size, *rest = tensors
    count = embeddings.shape[0]
    places = indices.shape == rank.shape == (count,) and size.shape == (1,) and count > 0
    if not places or any(t.ndim < 1 or t.shape[0] != count for t in rest):
        raise WireError("a pool has tensors of different lengths")
    where, num_tokens = indices.cpu().long(), int(size[0])
    ends = torch.tensor([-1]), torch.tensor([num_tokens])
    if not bool((torch.cat([ends[0], where, ends[1]]).diff() > 0).all()):
        raise WireError("a pool's places are not increasing places of its image")
    beside: dict[str, Any] = dict(zip(names, rest, strict=True))
    inputs = VisionInputs(embeddings=embeddings, **beside)
    return Pool(inputs, indices.long(), rank.long(), num_tokens)


class TokenSelector:
    """Chooses per request which tokens of a pool enter the decoder.

    Without `queries` only methods that do not read the question can choose.
    """

    def __init__(self, queries: QueryEncoder | None = None) -> None:
        self._queries = queries

    @torch.no_grad()
    def select(
        self,
        tensors: Sequence[torch.Tensor],
        spec: PruningSpec | None,
        query: str = "",
        budget: int | None = None,
    ) -> tuple[torch.Tensor, KeptTokens | None]:
        """The tokens [k, hidden] that stay, and which; None where that is the whole image.

        A `budget` below what `spec` keeps takes its place where a smaller choice is a prefix of a
        larger one. Raises `InvalidRequestError` for what this checkpoint cannot do, `WireError`
        for tensors that are no pool of `spec`.
        """
        return self.select_all([tensors], spec, [query], budget)[0]

    @torch.no_grad()
    def select_all(
        self,
        images: Sequence[Sequence[torch.Tensor]],
        spec: PruningSpec | None,
        queries: Sequence[str],
        budget: int | None = None,
    ) -> list[tuple[torch.Tensor, KeptTokens | None]]:
        """`select` for the images of one request, chosen from together."""
        pruner = spec.pruner() if spec is not None else None
        chosen: list[tuple[torch.Tensor, KeptTokens | None]] = [(i[0], None) for i in images]
        places = [place for place, tensors in enumerate(images) if len(tensors) > 1]
        if spec is None or pruner is None or not places:
            return chosen
        pruner = self._oriented(pruner)
        pools = [_unpacked(images[place], pruner) for place in places]
        counts = [spec.num_kept(pool.num_tokens) for pool in pools]
        if budget is not None and pruner.prefix:
            most = [count_of(budget, pool.num_tokens) for pool in pools]
            counts = [min(pair) for pair in zip(counts, most, strict=True)]
        vectors = [self._vectors(pruner, queries[place]) for place in places]
        try:
            keeps = pruner.select_all(pools, counts, queries=vectors)
        except PruningError as error:
            raise _refusal(error) from None
        digest = spec.fingerprint()
        for place, pool, keep in zip(places, pools, keeps, strict=True):
            kept = KeptTokens(pool.num_tokens, keep.tolist(), digest)
            chosen[place] = (pool.gather(keep), kept)
        return chosen

    def _oriented(self, pruner: TokenPruner) -> TokenPruner:
        """The pruner with the relevance sign of this checkpoint's tower, unless one was given."""
        asks = getattr(pruner, "query_encoder", None) == "clip_text"
        if not asks or getattr(pruner, "relevance_sign", None) is not None or not self._queries:
            return pruner
        return dataclasses.replace(pruner, relevance_sign=self._queries.sign)  # type: ignore[call-arg]

    def _vectors(self, pruner: TokenPruner, query: str) -> torch.Tensor | None:
        kind = getattr(pruner, "query_encoder", None)
        if kind is None or not query:
            return None
        if self._queries is None:
            raise InvalidRequestError(
                f"method {pruner.name} reads the question, which this worker cannot encode",
                "pruning.method",
            )
        return self._queries.encode(kind, query)


def pruned(sequence: NewSequence, spec: PruningSpec, kept: list[KeptTokens | None]) -> NewSequence:
    """`sequence` with the choice `kept` of its images, and with what the decoder is to drop."""
    return dataclasses.replace(
        sequence,
        kept=kept if any(kept) else [],
        positions=spec.positions,
        layer_keep=spec.layer_budget if sequence.mm_keys else None,
    )


def _refusal(error: PruningError) -> InvalidRequestError:
    field = "keep" if error.field == "num_kept" else "method"
    return InvalidRequestError(f"{error.field} must be {error.allowed}", f"pruning.{field}")
