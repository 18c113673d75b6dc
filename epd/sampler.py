"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, penalties, log-probabilities.

Penalties change the logits, `epd_kernels.draw_tokens` does the rest: the order is temperature,
top-k, top-p, min-p, each applied to what the ones before it left, and a draw inverts the cumulative
distribution of the kept tokens, most likely first, at a uniform number that depends on nothing but
the request's seed and the token's index: the same request draws the same tokens on any worker, in
any batch and in any attempt.
Log-probabilities are those of the model itself, before penalties and temperature.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch

from epd.request import SamplingParams, TokenOutput
from epd.staging import read_back, send_all
from epd_kernels.sampling import draw_tokens, keep_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SampleRow", "apply_penalties", "keep_counts", "likeliest", "sample", "uniform"]


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


def sample(
    logits: torch.Tensor, rows: Sequence[SampleRow], *, best: torch.Tensor | None = None
) -> list[TokenOutput | None]:
    """The next token of each row of fp32 `logits` [S, vocab]; None where a row is not finite.

    `best` int64 [S] are the likeliest tokens where they were found already, -1 for rows that are
    not finite. `logits` may be modified. The ids are read back once. Nothing is sent where all
    rows are greedy without penalties, and one small array where some are drawn.
    """
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    logprobs = torch.log_softmax(_pick(logits, wanted), dim=-1) if wanted else None
    penalised = [i for i, row in enumerate(rows) if _has_penalty(row.params)]
    if penalised:
        apply_penalties(logits, rows, penalised)
    if any(row.params.temperature > 0.0 for row in rows):
        ids = draw_tokens(logits, **_parameters(rows, logits.device))
    elif best is not None and not penalised:
        ids = best
    else:
        ids = likeliest(logits)
    outputs = [
        TokenOutput(row.index, token) if token >= 0 else None
        for row, token in zip(rows, read_back(ids), strict=True)
    ]
    if logprobs is not None:
        _add_logprobs(outputs, rows, wanted, logprobs)
    return outputs


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """int64 [S]: the best token of each row of `logits` [S, vocab], -1 where it is not finite."""
    best, index = logits.max(dim=-1)
    return torch.where(best.isfinite(), index, -1)


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
    places = (np.array(ids, np.int64) for ids in (row_ids, token_ids))
    changes = (np.array(values, np.float64) for values in (factors, offsets))
    i_row, i_token, factor, offset = send_all([*places, *changes], logits.device)
    values, factor = logits[i_row, i_token], factor.float()
    values = torch.where(values > 0, values / factor, values * factor) - offset.float()
    logits[i_row, i_token] = values


def _parameters(rows: Sequence[SampleRow], device: torch.device) -> dict[str, torch.Tensor]:
    """What `draw_tokens` takes beside the logits, fp64 `[S]` each, sent together."""
    table = np.array([
        (p.temperature, p.top_k, p.top_p, p.min_p, uniform(p.seed, row.index))
        for row in rows
        for p in (row.params,)
    ])  # fmt: skip
    names = ("temperature", "top_k", "top_p", "min_p", "points")
    return dict(zip(names, send_all(list(table.T), device), strict=True))


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
