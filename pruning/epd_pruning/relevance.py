"""How much each vision token matters to the question, and the base of methods that ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from epd_kernels import relevance as kernel
from epd_kernels.relevance import FLOOR
from epd_pruning.base import TokenPruner, VisionInputs
from epd_pruning.errors import PruningError
from epd_pruning.selection import at_least_fp32, stable_top_k, together, unit_rows

__all__ = [
    "FLOOR",
    "ConditionedPruner",
    "RelevanceForm",
    "RelevanceOnly",
    "raw_relevance",
    "shape_relevance",
]

QueryEncoder = Literal["clip_text", "llm_embed_mean"]
RelevanceForm = Literal["floor", "exp", "raw", "offset"]


def raw_relevance(
    tokens: Tensor, query: Tensor, *, normalise: bool = True, best_segments: bool = True
) -> Tensor:
    """Mean similarity [N] of each token [N, C] to the query segments [M, C], in fp32.

    Cosines, or dot products without `normalise`. With `best_segments` only the max(1, ⌊M/2⌋)
    segments nearest to the image on average count (Script's filter, idle at M = 1).
    """
    _check_widths(tokens, query)
    rescale = unit_rows if normalise else at_least_fp32
    similarity = rescale(query) @ rescale(tokens).mT
    if best_segments:
        kept = stable_top_k(similarity.mean(1), max(1, similarity.shape[0] // 2))
        similarity = similarity[kept]
    return similarity.mean(0)


def _check_widths(tokens: Tensor, query: Tensor) -> None:
    if tokens.shape[1] != query.shape[1]:
        raise PruningError("query", f"vectors of width {tokens.shape[1]}", tuple(query.shape))


def shape_relevance(raw: Tensor, form: RelevanceForm, weight: float = 0.5) -> Tensor:
    """r [N] > 0 for the kernel diag(r)·S·diag(r): `raw` min-maxed over the image, then shaped.

    `floor`: at least `FLOOR`. `exp`: e^(α(r−1)) with α = θ / (2(1−θ)), θ = `weight`; 0 leaves the
    plain DPP. `raw`: as it is, 0 included (Script's release). `offset`: 1e-6 on the numerator
    (CDPruner's release). Where every value is equal, or one is not finite, r = 1.
    """
    return kernel.shape_relevance(raw, form, _exponent(weight))


def _exponent(weight: float) -> float:
    """α of e^(α(r−1))."""
    return weight / (2 * (1 - weight))


@dataclass(frozen=True)
class ConditionedPruner(TokenPruner):
    """A method that weighs tokens by the question.

    `query_encoder` says what `query` holds. `clip_text`: pooled vectors of the text tower, compared
    with the `aligned` tokens. `llm_embed_mean`: the mean of the LLM's input embeddings of the
    instruction, compared with the projected `embeddings`. `relevance_sign` −1 suits CLIP's patch
    similarities, which come out inverted, +1 a tower trained on patches and the LLM's embeddings;
    None takes −1 for `clip_text` and +1 otherwise. Without a query every token is as relevant.
    """

    best_segments: ClassVar[bool] = False

    query_encoder: QueryEncoder = "clip_text"
    relevance_sign: Literal[-1, 1] | None = None
    relevance_form: RelevanceForm = "floor"
    relevance_weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.relevance_weight < 1.0:
            raise PruningError("relevance_weight", "in [0, 1)", self.relevance_weight)

    @property
    def query_needs(self) -> frozenset[str]:
        return frozenset({"aligned"} if self.query_encoder == "clip_text" else ())

    def pool_size(self, num_tokens: int, num_kept: int) -> int:
        return num_tokens

    def relevance(self, inputs: VisionInputs) -> Tensor:
        """r [N] of `inputs` under its query; ones where the question is empty."""
        return self.relevances([inputs])[0]

    def relevances(self, inputs: Sequence[VisionInputs]) -> Tensor:
        """`relevance` [B, N] of pools of one shape, each under its own query."""
        first = inputs[0]
        if first.query is None or first.query.shape[0] == 0:
            return torch.ones(len(inputs), first.num_tokens, device=first.device)
        clip = self.query_encoder == "clip_text"
        sign: Literal[-1, 1] = self.relevance_sign or (-1 if clip else 1)
        tokens = [one.require("aligned") if clip else one.embeddings for one in inputs]
        queries = [one.require("query") for one in inputs]
        if queries[0].shape[0] > 1 or self.relevance_form == "raw":
            return torch.stack(
                [self._shaped(sign, *pair) for pair in zip(tokens, queries, strict=True)]
            )
        _check_widths(tokens[0], queries[0])
        return kernel.relevance(
            together(tokens),
            torch.cat(queries),
            sign=sign,
            form=self.relevance_form,
            weight=_exponent(self.relevance_weight),
        )

    def _shaped(self, sign: int, tokens: Tensor, query: Tensor) -> Tensor:
        normalise = self.relevance_form != "raw"
        raw = raw_relevance(tokens, query, normalise=normalise, best_segments=self.best_segments)
        return shape_relevance(sign * raw, self.relevance_form, self.relevance_weight)


@dataclass(frozen=True)
class RelevanceOnly(ConditionedPruner):
    """The most relevant tokens, however alike: the conditional methods without diversity."""

    name: ClassVar[str] = "relevance"

    def rank_query(self, inputs: VisionInputs, num_kept: int) -> Tensor:
        return stable_top_k(self.relevance(inputs), num_kept)
