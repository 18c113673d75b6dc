"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, penalties, log-probabilities.

The filters apply in the order penalties, temperature, top-k, top-p, min-p, each to what the ones
before it left. A draw inverts the cumulative distribution of the kept tokens, most likely first, at
a uniform number that depends on nothing but the request's seed and the token's index: the same
request draws the same tokens on any worker, in any batch and in any attempt.
Log-probabilities are those of the model itself, before penalties and temperature.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

from epd.request import SamplingParams, TokenOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SampleRow", "apply_penalties", "keep_counts", "sample", "uniform"]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of logits is sampled with. `tokens` is the prompt, then the output so far."""

    params: SamplingParams
    tokens: list[int]
    num_prompt: int

    @property
    def index(self) -> int:
        """Index of the token to sample among the output tokens."""
        return len(self.tokens) - self.num_prompt


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a fixed function of the seed and the token's index."""
    data = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    digest = blake2b(data, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[TokenOutput | None]:
    """The next token of each row of fp32 `logits` [S, vocab]; None where a row is not finite.

    `logits` may be modified. One transfer from the device when no row asks for log-probabilities.
    """
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = torch.log_softmax(_pick(logits, wanted), dim=-1) if wanted else None
    penalised = [i for i, row in enumerate(rows) if _has_penalty(row.params)]
    if penalised:
        apply_penalties(logits, rows, penalised)
    best, ids = logits.max(dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0.0]
    if drawn:
        index = torch.tensor(drawn, device=ids.device)
        ids = ids.index_copy(0, index, _draw(_pick(logits, drawn), [rows[i] for i in drawn]))
    chosen = torch.where(best.isfinite(), ids, -1).tolist()
    outputs = [
        TokenOutput(row.index, token) if token >= 0 else None
        for row, token in zip(rows, chosen, strict=True)
    ]
    if logprobs is not None:
        _add_logprobs(outputs, rows, wanted, logprobs)
    return outputs


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _pick(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def apply_penalties(logits: torch.Tensor, rows: Sequence[SampleRow], chosen: Sequence[int]) -> None:
    """Penalise tokens of the `chosen` rows in place.

    Repetition (CTRL, arXiv 1909.05858) divides positive and multiplies negative logits of every
    token seen in prompt or output; presence and frequency subtract, once and per occurrence, for
    tokens seen in the output.
    """
    vocab = logits.shape[-1]
    row_ids: list[int] = []
    token_ids: list[int] = []
    factors: list[float] = []
    offsets: list[float] = []
    for i in chosen:
        row, params = rows[i], rows[i].params
        counts = Counter(row.tokens[row.num_prompt :])
        seen = counts.keys() | set(row.tokens) if params.repetition_penalty != 1.0 else counts
        tokens = [token for token in seen if token < vocab]
        row_ids += [i] * len(tokens)
        token_ids += tokens
        factors += [params.repetition_penalty] * len(tokens)
        offsets += [
            params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0)
            for token in tokens
        ]
    at = torch.tensor([row_ids, token_ids], dtype=torch.int64, device=logits.device)
    change = torch.tensor([factors, offsets], dtype=torch.float32, device=logits.device)
    values = logits[at[0], at[1]]
    values = torch.where(values > 0, values / change[0], values * change[0]) - change[1]
    logits[at[0], at[1]] = values


def keep_counts(
    probs: torch.Tensor, *, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """How many of the descending `probs` [S, vocab] each row keeps, at least 1. int64 [S].

    top-k keeps k tokens (0: all); top-p the shortest prefix whose share of the top-k mass reaches
    p (arXiv 1904.09751); min-p the tokens of at least p times the best (arXiv 2407.01082).
    """
    vocab = probs.shape[-1]
    by_k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    rank = torch.arange(vocab, device=probs.device)
    probs = probs.masked_fill(rank >= by_k[:, None], 0.0)
    before = probs.cumsum(-1) - probs
    mass = probs.sum(-1, keepdim=True)
    by_p = torch.where(top_p < 1.0, (before < top_p[:, None] * mass).sum(-1), vocab)
    by_min = (probs >= min_p[:, None] * probs[:, :1]).sum(-1)
    return torch.minimum(torch.minimum(by_k, by_p), by_min).clamp(min=1)


def _draw(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """One token id per row by inversion, in fp64 so that devices agree on the draw."""
    table = torch.tensor(
        [
            [p.temperature, p.top_k, p.top_p, p.min_p, uniform(p.seed, row.index)]
            for row in rows
            for p in (row.params,)
        ],
        dtype=torch.float64,
        device=logits.device,
    )
    temperature, top_k, top_p, min_p, point = table.unbind(1)
    scores, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = torch.softmax(scores.double() / temperature[:, None], dim=-1)
    kept = keep_counts(probs, top_k=top_k.long(), top_p=top_p, min_p=min_p)
    mass = probs.cumsum(-1)
    target = point[:, None] * mass.gather(1, kept[:, None] - 1)
    place = torch.minimum((mass <= target).sum(-1), kept - 1)
    return order.gather(1, place[:, None]).squeeze(1)


def _add_logprobs(
    outputs: list[TokenOutput | None],
    rows: Sequence[SampleRow],
    wanted: list[int],
    logprobs: torch.Tensor,
) -> None:
    """Replace the outputs of the `wanted` rows by ones that carry log-probabilities."""
    ids = [max(output.token_id, 0) if (output := outputs[i]) else 0 for i in wanted]
    chosen = logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])[:, 0].tolist()
    most = min(max(rows[i].params.logprobs or 0 for i in wanted), logprobs.shape[-1])
    values, tokens = logprobs.topk(most, dim=-1)
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    best = [list(zip(t, v, strict=True)) for t, v in pairs]
    for place, i in enumerate(wanted):
        output = outputs[i]
        if output is not None:
            top = best[place][: rows[i].params.logprobs]
            outputs[i] = TokenOutput(output.index, output.token_id, chosen[place], top)
