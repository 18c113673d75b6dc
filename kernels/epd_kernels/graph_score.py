"""Redundancy of vision tokens in the graph of their cosine similarities, tile by tile.

With S_ij = x_i . x_j / (|x_i| |x_j|), edges where S_ij >= tau, degree d_i, mean edge weight mu_i
and mean similarity b_i over the compared tokens,

    R_i = d_i exp(gamma (mu_i - tau))        R_i = (R_i + b_i) / 2 where d_i < min_degree

Dense compares every token with every token, itself included. Bipartite compares even with odd
tokens: even ones are scored by the rows of that block of S, odd ones by its columns. A threshold
can be a quantile of the compared pairs, read off a histogram of `BINS` cells over [-1, 1] and
rounded down to the edge of its cell. A tile of S exists in registers only: three sums per token
leave it, and S itself is never stored. Products are of the inputs as they are, sums in fp32.
"""

from __future__ import annotations

import math

import torch

from .launch import INTERPRETED, jit, next_power_of_2, tl

__all__ = ["BINS", "TILE", "graph_score", "graph_score_ref", "inverse_norms_triton"]

BINS = 2048

# rows, depth and warps of a tile of S: one shape for all, so that no batch changes the rounding
TILE = (16, 32, 4) if INTERPRETED else (64, 128, 4)


def graph_score(
    x: torch.Tensor, *, bipartite: bool = False, tau: float = 0.2, quantile: float | None = None,
    min_degree: int = 4, gamma: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """R `[B, N]` in fp32 of the tokens `x [B, N, D]` of B images; `quantile` replaces `tau`."""
    run = graph_score_triton if x.is_cuda else graph_score_ref
    return run(
        x, bipartite=bipartite, tau=tau, quantile=quantile, min_degree=min_degree, gamma=gamma
    )


def graph_score_ref(
    x: torch.Tensor, *, bipartite: bool = False, tau: float = 0.2, quantile: float | None = None,
    min_degree: int = 4, gamma: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """`graph_score` in torch, from a stored similarity matrix."""
    rows = x.float() * _inverse_norms(x)[:, :, None]
    left, right = (rows[:, 0::2], rows[:, 1::2]) if bipartite else (rows, rows)
    # image by image: a batched product rounds differently, and nobody's neighbours may matter
    similarity = torch.stack([one @ other.mT for one, other in zip(left, right, strict=True)])
    if quantile is None:
        threshold = torch.full((x.shape[0],), tau, device=x.device)
    else:
        cells = ((similarity + 1) * (BINS / 2)).long().clamp(0, BINS - 1).flatten(1)
        histogram = torch.zeros(x.shape[0], BINS, dtype=torch.int64, device=x.device)
        histogram.scatter_add_(1, cells, torch.ones_like(cells))
        threshold = _threshold(histogram, quantile)
    edges = similarity >= threshold[:, None, None]
    parts = torch.stack([edges.float(), similarity * edges, similarity])
    sums = [parts.sum(-1), parts.sum(-2)] if bipartite else [parts.sum(-1)]
    return _score(sums, threshold, x.shape[1], min_degree, gamma)


def _inverse_norms(x: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norms.clamp_min(1e-12).reciprocal()


def _threshold(histogram: torch.Tensor, quantile: float) -> torch.Tensor:
    """Lower edge `[B]` of the cell that holds the quantile of a histogram `[B, BINS]`."""
    reached = histogram.cumsum(1)
    place = (reached[:, -1:] * quantile).ceil().clamp_min(1)
    return (reached < place).sum(1).float() * (2 / BINS) - 1


def _score(
    sums: list[torch.Tensor], tau: torch.Tensor, size: int, min_degree: int, gamma: float
) -> torch.Tensor:
    """R `[B, N]` from `[3, B, A]` degrees, edge sums and sums of each side, sides interleaved."""
    score = torch.empty(len(tau), size, device=tau.device)
    for side, (degree, edges, everything) in enumerate(sums):
        compared = size if len(sums) == 1 else size - degree.shape[1]
        mean_edge = edges / degree.clamp_min(1)
        connected = degree * torch.exp(gamma * (mean_edge - tau[:, None]))
        lonely = 0.5 * connected + 0.5 * everything / max(compared, 1)
        score[:, side :: len(sums)] = torch.where(degree >= min_degree, connected, lonely)
    return score


@jit
def _norm_kernel(x: tl.tensor, inverse: tl.tensor, D: tl.tensor, BLOCK_D: tl.constexpr) -> None:
    """One row per program: `inverse` = 1 / max(|x|, 1e-12)."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    for i_d in range(0, D, BLOCK_D):
        b_x = tl.load(x + i_row * D + i_d + o_d, i_d + o_d < D, 0.0).to(tl.float32)
        b_sum += b_x * b_x
    tl.store(inverse + i_row, 1.0 / tl.maximum(tl.sqrt(tl.sum(b_sum, axis=0)), 1e-12))


def inverse_norms_triton(x: torch.Tensor) -> torch.Tensor:
    """1 / |x| `[B, N]` in fp32 of the rows of a contiguous `x [B, N, D]`."""
    inverse = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    block = min(next_power_of_2(x.shape[2]), 1024)
    _norm_kernel[(inverse.numel(),)](x, inverse, x.shape[2], BLOCK_D=block, num_warps=4)
    return inverse


@jit
def _graph_kernel(
    x: tl.tensor, inverse: tl.tensor, tau: tl.tensor, row_sums: tl.tensor, column_sums: tl.tensor,
    histogram: tl.tensor, num_tokens: tl.tensor, D: tl.tensor, num_rows: tl.tensor,
    num_columns: tl.tensor, STEP: tl.constexpr, HISTOGRAM: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of S per program. With STEP 2 rows are the even tokens and columns the odd ones.

    With STEP 1 S is symmetric: tiles below the diagonal are left to those above it.
    """
    i_b, i_r, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    if STEP == 2 or i_c >= i_r:
        o_r, o_c = i_r * BLOCK + tl.arange(0, BLOCK), i_c * BLOCK + tl.arange(0, BLOCK)
        m_r, m_c = o_r < num_rows, o_c < num_columns
        o_x = i_b * num_tokens + o_r * STEP
        o_y = i_b * num_tokens + o_c * STEP + (STEP - 1)
        b_s = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for i_d in range(0, D, BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            b_x = tl.load(x + o_x[:, None] * D + o_d[None, :], m_r[:, None] & m_d[None, :], 0.0)
            b_y = tl.load(x + o_y[:, None] * D + o_d[None, :], m_c[:, None] & m_d[None, :], 0.0)
            b_s = tl.dot(b_x, tl.trans(b_y), b_s, input_precision="ieee")
        b_s *= tl.load(inverse + o_x, m_r, 0.0)[:, None]
        b_s *= tl.load(inverse + o_y, m_c, 0.0)[None, :]
        m_s = m_r[:, None] & m_c[None, :]
        mirrored = (STEP == 1) & (i_c > i_r)
        if HISTOGRAM:
            b_cell = tl.minimum(tl.maximum(((b_s + 1) * (BINS // 2)).to(tl.int32), 0), BINS - 1)
            # pairs beyond the edge are counted in the first cell, and taken out of it again
            b_count = tl.histogram(tl.reshape(tl.where(m_s, b_cell, 0), (BLOCK * BLOCK,)), BINS)
            o_h = tl.arange(0, BINS)
            b_beyond = BLOCK * BLOCK - tl.sum(tl.sum(m_s.to(tl.int32), axis=1), axis=0)
            b_count -= tl.where(o_h == 0, b_beyond, 0)
            b_count = tl.where(mirrored, 2 * b_count, b_count)
            tl.atomic_add(histogram + i_b * BINS + o_h, b_count, mask=b_count != 0)
        else:
            b_edge = (m_s & (b_s >= tl.load(tau + i_b))).to(tl.float32)
            b_edges = b_s * b_edge
            o_p = (i_b * tl.num_programs(2) + i_c) * 3 * num_rows + o_r
            tl.store(row_sums + o_p, tl.sum(b_edge, axis=1), m_r)
            tl.store(row_sums + o_p + num_rows, tl.sum(b_edges, axis=1), m_r)
            tl.store(row_sums + o_p + 2 * num_rows, tl.sum(b_s, axis=1), m_r)
            # with STEP 1 the columns' sums are the rows' of the tile across the diagonal
            m_o = m_c & ((STEP == 2) | mirrored)
            o_p = (i_b * tl.num_programs(1) + i_r) * 3 * num_columns + o_c
            tl.store(column_sums + o_p, tl.sum(b_edge, axis=0), m_o)
            tl.store(column_sums + o_p + num_columns, tl.sum(b_edges, axis=0), m_o)
            tl.store(column_sums + o_p + 2 * num_columns, tl.sum(b_s, axis=0), m_o)


@jit
def _threshold_kernel(
    histogram: tl.tensor, tau: tl.tensor, quantile: tl.tensor, BINS: tl.constexpr
) -> None:
    """One image per program: the lower edge of the cell that holds the quantile."""
    i_b = tl.program_id(0).to(tl.int64)
    b_reached = tl.cumsum(tl.load(histogram + i_b * BINS + tl.arange(0, BINS)), axis=0)
    total = tl.max(b_reached, axis=0).to(tl.float32)
    place = tl.maximum(tl.ceil(total * quantile), 1.0)
    below = tl.sum((b_reached.to(tl.float32) < place).to(tl.float32), axis=0)
    tl.store(tau + i_b, below * (2 / BINS) - 1)


@jit
def _score_kernel(
    sums: tl.tensor, tau: tl.tensor, score: tl.tensor, num_tokens: tl.tensor, num_rows: tl.tensor,
    num_tiles: tl.tensor, compared: tl.tensor, min_degree: tl.tensor, gamma: tl.tensor,
    side: tl.tensor, num_sides: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """R of BLOCK tokens of one side of one image, from `sums [B, num_tiles, 3, num_rows]`."""
    i_b = tl.program_id(0).to(tl.int64)
    o_r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < num_rows
    b_degree = tl.zeros((BLOCK,), tl.float32)
    b_edges = tl.zeros((BLOCK,), tl.float32)
    b_all = tl.zeros((BLOCK,), tl.float32)
    for i_t in range(0, num_tiles):
        o_p = (i_b * num_tiles + i_t) * 3 * num_rows + o_r
        b_degree += tl.load(sums + o_p, m_r, 0.0)
        b_edges += tl.load(sums + o_p + num_rows, m_r, 0.0)
        b_all += tl.load(sums + o_p + 2 * num_rows, m_r, 0.0)
    b_mean = b_edges / tl.maximum(b_degree, 1.0)
    b_score = b_degree * tl.exp(gamma * (b_mean - tl.load(tau + i_b)))
    b_lonely = 0.5 * b_score + 0.5 * b_all / compared
    b_score = tl.where(b_degree >= min_degree, b_score, b_lonely)
    tl.store(score + i_b * num_tokens + o_r * num_sides + side, b_score, m_r)


def graph_score_triton(
    x: torch.Tensor, *, bipartite: bool = False, tau: float = 0.2, quantile: float | None = None,
    min_degree: int = 4, gamma: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """`graph_score` on the device of `x`: one pass over the tiles of S, two for a quantile."""
    batch, size, width = x.shape
    rows, columns = ((size + 1) // 2, size // 2) if bipartite else (size, size)
    if not batch * columns:
        return graph_score_ref(
            x, bipartite=bipartite, tau=tau, quantile=quantile, min_degree=min_degree, gamma=gamma
        )
    x = x.contiguous()
    inverse = inverse_norms_triton(x)
    block, block_d, warps = TILE
    grid = (batch, math.ceil(rows / block), math.ceil(columns / block))
    sums = [torch.empty(batch, grid[2], 3, rows, device=x.device)]
    # across the diagonal the columns' sums fill the rows' slots
    sums += [torch.empty(batch, grid[1], 3, columns, device=x.device)] if bipartite else []
    threshold = torch.full((batch,), tau, dtype=torch.float32, device=x.device)
    counts = batch * BINS if quantile is not None else 0
    histogram = torch.zeros(counts, dtype=torch.int32, device=x.device)
    for counting in (True, False) if quantile is not None else (False,):
        _graph_kernel[grid](
            x, inverse, threshold, sums[0], sums[-1], histogram, size, width, rows, columns,
            STEP=len(sums), HISTOGRAM=counting, BINS=BINS, BLOCK=block, BLOCK_D=block_d,
            num_warps=2 * warps if counting else warps, num_stages=3,
        )  # fmt: skip
        if counting:
            _threshold_kernel[(batch,)](histogram, threshold, quantile, BINS=BINS, num_warps=4)
    score = torch.empty(batch, size, device=x.device)
    for side, (part, other) in enumerate(zip(sums, (columns, rows), strict=False)):
        own = part.shape[3]
        _score_kernel[(batch, math.ceil(own / 64))](
            part, threshold, score, size, own, part.shape[1], float(max(other, 1)),
            float(min_degree), float(gamma), side, len(sums), BLOCK=64, num_warps=2,
        )  # fmt: skip
    return score
