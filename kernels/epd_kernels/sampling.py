"""The next token of each row of logits: greedy, or a draw after top-k, top-p and min-p.

A row is ordered by falling logit, equal ones by rising id. p is its softmax at the temperature, in
that order. top-k keeps the first k tokens (0: all), top-p the shortest beginning whose share of the
top-k mass reaches p (arXiv 1904.09751), min-p the tokens of at least p times the best (arXiv
2407.01082); what all three keep is a beginning of the order too. The draw inverts its cumulative
distribution at a number in [0, 1): the first token at which the sum exceeds that share of the kept
mass. Temperature 0 takes the first token.

The reference sorts, in fp64. The kernels find the same places by bisection (`ranked_draw.py`), with
weights of fp32 accuracy whose sums are exact: a token differs from the reference's only where the
number lies within some 2^-18 of a boundary, and never between batches or runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .launch import INTERPRETED, next_power_of_2
from .ranked_draw import draw_kernel
from .token_ranks import FINE_SIZE, STATE_SIZE, best_kernel, count_kernel, head_kernel

__all__ = ["DrawConfig", "draw_config", "draw_tokens", "draw_tokens_ref", "keep_counts"]


def draw_tokens(
    logits: torch.Tensor, *, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
    min_p: torch.Tensor, points: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Token ids int64 `[S]` of fp32 `logits [S, V]`; -1 where the best logit is not finite.

    Every parameter is a tensor `[S]` beside the logits, of any float type (`top_k`: of any type):
    `temperature` >= 0, `top_p` in (0, 1], `min_p` in [0, 1], `points` in [0, 1). No value is read
    back.
    """
    run = draw_tokens_triton if logits.is_cuda else draw_tokens_ref
    return run(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
               points=points)  # fmt: skip


def keep_counts(
    probs: torch.Tensor, *, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """How many of the descending `probs` [S, V] each row keeps, at least 1. int64 [S]."""
    vocab = probs.shape[-1]
    by_k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    rank = torch.arange(vocab, device=probs.device)
    probs = probs.masked_fill(rank >= by_k[:, None], 0.0)
    before = probs.cumsum(-1) - probs
    mass = probs.sum(-1, keepdim=True)
    by_p = torch.where(top_p < 1.0, (before < top_p[:, None] * mass).sum(-1), vocab)
    by_min = (probs >= min_p[:, None] * probs[:, :1]).sum(-1)
    return torch.minimum(torch.minimum(by_k, by_p), by_min).clamp(min=1)


def draw_tokens_ref(
    logits: torch.Tensor, *, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
    min_p: torch.Tensor, points: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`draw_tokens` in torch."""
    scores, order = logits.sort(dim=-1, descending=True, stable=True)
    is_greedy = temperature == 0
    divisor = torch.where(is_greedy, 1.0, temperature.double())
    probs = torch.softmax(scores.double() / divisor[:, None], dim=-1)
    kept = keep_counts(probs, top_k=top_k.long(), top_p=top_p.double(), min_p=min_p.double())
    mass = probs.cumsum(-1)
    target = points.double()[:, None] * mass.gather(1, kept[:, None] - 1)
    place = torch.minimum((mass <= target).sum(-1), kept - 1).masked_fill(is_greedy, 0)
    ids = order.gather(1, place[:, None]).squeeze(1)
    return torch.where(scores[:, 0].isfinite(), ids, -1)


def draw_tokens_triton(
    logits: torch.Tensor, *, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
    min_p: torch.Tensor, points: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`draw_tokens` on the device of `logits`."""
    rows, vocab = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1 and vocab < 1 << 22
    told = (temperature, top_k, top_p, min_p, points)
    assert all(column.shape == (rows,) and column.is_contiguous() for column in told)
    device = logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if not rows:
        return out
    launch = draw_config()
    chunk, head = launch.chunk, launch.head
    chunks = -(-vocab // chunk)
    best = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    state = torch.empty(rows, STATE_SIZE, dtype=torch.int64, device=device)
    fine = torch.empty(rows, 2 * FINE_SIZE, dtype=torch.int64, device=device)
    ranks = torch.empty(rows, 2 * head, dtype=torch.int64, device=device)
    grid, stride = (rows, chunks), logits.stride(0)
    bits = {"ID_BITS": vocab.bit_length(), "CHUNK": chunk, "num_warps": launch.num_warps}
    wide = bits | {"CHUNKS": next_power_of_2(chunks)}
    best_kernel[grid](logits, best, state, fine, stride, vocab, **bits)
    count_kernel[grid](logits, best, state, temperature, stride, vocab, **wide)
    head_kernel[grid](
        logits, best, state, fine, ranks, temperature, top_k, top_p, points, stride, vocab,
        HEAD=head, **wide,
    )  # fmt: skip
    wide |= {"CHUNK": launch.pass_chunk, "num_warps": launch.pass_warps}
    draw_kernel[(rows,)](
        logits, best, state, fine, ranks, out, *told, stride, chunks, vocab, HEAD=head, **wide
    )
    return out


@dataclass(frozen=True, slots=True)
class DrawConfig:
    """How rows are drawn from: powers of two.

    Tokens and warps of the programs that share a row, ranks of a head, tokens and warps of the
    program that draws.
    """

    chunk: int
    num_warps: int
    head: int
    pass_chunk: int
    pass_warps: int


def draw_config() -> DrawConfig:
    """The launch configuration, tiny where interpreted so that every path is taken."""
    return DrawConfig(128, 4, 64, 128, 4) if INTERPRETED else DrawConfig(2048, 4, 2048, 4096, 8)
