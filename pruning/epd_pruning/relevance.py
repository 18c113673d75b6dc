"""How much each vision token matters to the question, and the base of methods that ask it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from epd_pruning.base import TokenPruner, VisionInputs
from epd_pruning.errors import PruningError
from epd_pruning.selection import at_least_fp32, stable_top_k, unit_rows

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

# the least relevant token stays selectable: r = 0 could never be chosen before residuals run out
FLOOR = 1e-3


def raw_relevance(
    tokens: Tensor, query: Tensor, *, normalise: bool = True, best_segments: bool = True
) -> Tensor:
    """Mean similarity [N] of each token [N, C] to the query segments [M, C], in fp32.

    Cosines, or dot products without `normalise`. With `best_segments` only the max(1, ⌊M/2⌋)
    segments nearest to the image on average count (Script's filter, idle at M = 1).
    """
    if tokens.shape[1] != query.shape[1]:
        raise PruningError("query", f"vectors of width {tokens.shape[1]}", tuple(query.shape))
    rescale = unit_rows if normalise else at_least_fp32
    similarity = rescale(query) @ rescale(tokens).mT
    if best_segments:
        kept = stable_top_k(similarity.mean(1), max(1, similarity.shape[0] // 2))
        similarity = similarity[kept]
    return similarity.mean(0)


def shape_relevance(raw: Tensor, form: RelevanceForm, weight: float = 0.5) -> Tensor:
    """r [N] > 0 for the kernel diag(r)·S·diag(r): `raw` min-maxed over the image, then shaped.

    `floor`: at least `FLOOR`. `exp`: e^(α(r−1)) with α = θ / (2(1−θ)), θ = `weight`; 0 leaves the
    plain DPP. `raw`: as it is, 0 included (Script's release). `offset`: 1e-6 on the numerator
    (CDPruner's release). Where every value is equal, or one is not finite, r = 1.
    """
    low, high = raw.min(), raw.max()
    flat = ~((high - low) > 1e-6 * raw.abs().max())
    shaped = (raw - low) / (high - low).clamp_min(torch.finfo(raw.dtype).tiny)
    if form == "floor":
        shaped = shaped.clamp_min(FLOOR)
    elif form == "exp":
        shaped = torch.exp(weight / (2 * (1 - weight)) * (shaped - 1))
    elif form == "offset":
        shaped = shaped + 1e-6 / (high - low).clamp_min(torch.finfo(raw.dtype).tiny)
    return torch.where(flat | ~raw.isfinite().all(), 1.0, shaped)


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
        if inputs.query is None or inputs.query.shape[0] == 0:
            return torch.ones(inputs.num_tokens, device=inputs.device)
        clip = self.query_encoder == "clip_text"
        raw = raw_relevance(
            inputs.require("aligned") if clip else inputs.embeddings,
            inputs.query,
            normalise=self.relevance_form != "raw",
            best_segments=self.best_segments,
        )
        sign = self.relevance_sign or (-1 if clip else 1)
        return shape_relevance(sign * raw, self.relevance_form, self.relevance_weight)


@dataclass(frozen=True)
class RelevanceOnly(ConditionedPruner):
    """The most relevant tokens, however alike: the conditional methods without diversity."""

    name: ClassVar[str] = "relevance"

    def rank_query(self, inputs: VisionInputs, num_kept: int) -> Tensor:
        return stable_top_k(self.relevance(inputs), num_kept)
