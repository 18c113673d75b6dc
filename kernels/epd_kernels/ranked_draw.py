"""A place in the order of a row's tokens, found by bisection instead of sorting.

A place is the first token at which the count, or the mass, of the tokens so far exceeds a goal. A
program per row seeks up to three of them: the last token of top-k, the last of top-p, and the one
that is drawn. Where the place lies in the head of the row (see `token_ranks`), its ranks are halved
in registers, between logits, then between ids of equal ones; else those of its fine bin are, once
passes over the row have left at most HEAD of them.
"""

from __future__ import annotations

from .launch import jit, tl
from .token_ranks import (
    DEPTH,
    FINE,
    HIGHEST,
    INFINITY,
    LOWEST,
    MASS_AT,
    NOTHING,
    STATE,
    depth_of,
    fine_bin,
    head_size,
    key_of,
    mass_of,
    put_ranks,
    rank_of,
    row_facts,
    value_of,
)

__all__ = ["draw_kernel"]


@jit
def _middle(low: tl.tensor, high: tl.tensor, ID_BITS: tl.constexpr) -> tl.tensor:
    """A rank in (low, high], halfway between their logits, or their ids where these are equal."""
    first, last = (low >> ID_BITS).to(tl.int32), (high >> ID_BITS).to(tl.int32)
    key = key_of(value_of(first) * 0.5 + value_of(last) * 0.5)
    key = tl.minimum(tl.maximum(key, first + 1), last)
    by_id = low + ((high - low + 1) >> 1)
    return tl.where(first == last, by_id, key.to(tl.int64) << ID_BITS)


@jit
def _sum_row(
    logits: tl.tensor, least: tl.tensor, top: tl.tensor, scale: tl.tensor, V: tl.tensor,
    ID_BITS: tl.constexpr, CHUNK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of the tokens of a row that have mass and at least the rank `least`, how many and their mass.

    Then the lowest key among them, and the highest among the others that have mass.
    """
    # four tokens a thread are summed at once, or the sums would not fit its registers
    ROWS: tl.constexpr = CHUNK // 4
    b_count = tl.zeros((ROWS,), tl.int32)
    b_mass = tl.zeros((ROWS,), tl.int64)
    b_lowest = tl.full((ROWS,), INFINITY, tl.int32)
    b_highest = tl.full((ROWS,), NOTHING, tl.int32)
    key = (least >> ID_BITS).to(tl.int32)
    token = (1 << ID_BITS) - 1 - (least & ((1 << ID_BITS) - 1)).to(tl.int32)
    for i_v in range(0, V, CHUNK):
        o_v = i_v + tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]
        b_x = tl.load(logits + o_v, o_v < V, float("-inf"))
        b_depth, b_key = depth_of(b_x, top, scale), key_of(b_x)
        m_v = b_depth < DEPTH
        m_in = m_v & ((b_key > key) | ((b_key == key) & (o_v <= token)))
        b_count += tl.sum(m_in.to(tl.int32), axis=1)
        b_mass += tl.sum(tl.where(m_in, mass_of(b_depth), 0), axis=1)
        b_lowest = tl.minimum(b_lowest, tl.min(tl.where(m_in, b_key, INFINITY), axis=1))
        m_out = m_v & (m_in == 0)
        b_highest = tl.maximum(b_highest, tl.max(tl.where(m_out, b_key, NOTHING), axis=1))
    count, mass = tl.sum(b_count, axis=0).to(tl.int64), tl.sum(b_mass, axis=0)
    return count, mass, tl.min(b_lowest, axis=0), tl.max(b_highest, axis=0)


@jit
def _fine_place(
    fine: tl.tensor, goal: tl.tensor, by_count: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The fine bin of a place; how many tokens up to and above it, and the mass above."""
    o_f = tl.arange(0, FINE)
    b_mass, b_count = tl.load(fine + o_f), tl.load(fine + FINE + o_f)
    b_reached = tl.cumsum(tl.where(by_count, b_count, b_mass), axis=0)
    i_bin = tl.sum((b_reached <= goal).to(tl.int32), axis=0)
    up_to = tl.sum(tl.where(o_f <= i_bin, b_count, 0), axis=0)
    above = tl.sum(tl.where(o_f < i_bin, b_count, 0), axis=0)
    above_mass = tl.sum(tl.where(o_f < i_bin, b_mass, 0), axis=0)
    return i_bin, up_to, above, above_mass


@jit
def _bounds(
    i_bin: tl.tensor, best: tl.tensor, top: tl.tensor, scale: tl.tensor, ID_BITS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Ranks that no token of a fine bin lies outside of; the bins beside it are let in."""
    slack = tl.abs(top) * 1e-6
    least = top - (i_bin.to(tl.float32) + 2.0) * (DEPTH / FINE) / scale - slack
    most = top - (i_bin.to(tl.float32) - 1.0) * (DEPTH / FINE) / scale + slack
    low = key_of(tl.maximum(least, -3e38)).to(tl.int64) << ID_BITS
    high = (key_of(tl.minimum(most, 3e38)).to(tl.int64) + 1) << ID_BITS
    return low, tl.minimum(high, best)


@jit
def _narrow(
    logits: tl.tensor, ranks: tl.tensor, fine: tl.tensor, best: tl.tensor, goal: tl.tensor,
    by_count: tl.tensor, top: tl.tensor, scale: tl.tensor, V: tl.tensor, ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr, HEAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Leave at most HEAD ranks around a place at `ranks`; how many, count and mass above them."""
    i_bin, up_to, above, above_mass = _fine_place(fine, goal, by_count)
    low, high = _bounds(i_bin, best, top, scale, ID_BITS)
    while up_to - above > HEAD:
        middle = _middle(low, high, ID_BITS)
        count, mass, lowest, highest = _sum_row(logits, middle, top, scale, V, ID_BITS, CHUNK)
        is_deep = tl.where(by_count, count, mass) > goal
        # no farther out than the nearest token: what lies between logits costs no pass
        lowest_rank = tl.maximum(middle, lowest.to(tl.int64) << ID_BITS)
        highest_rank = tl.minimum(middle, (highest.to(tl.int64) + 1) << ID_BITS) - 1
        low = tl.where(is_deep, tl.maximum(low, lowest_rank), low)
        high = tl.where(is_deep, high, tl.minimum(high, highest_rank))
        # bounds may lie outside of the bin, whose own counts are then the nearer ones
        up_to = tl.where(is_deep, tl.minimum(up_to, count), up_to)
        above = tl.where(is_deep, above, tl.maximum(above, count))
        above_mass = tl.where(is_deep, above_mass, tl.maximum(above_mass, mass))
    start = 0
    for i_v in range(0, V, CHUNK):
        o_v = i_v + tl.arange(0, CHUNK)
        b_x = tl.load(logits + o_v, o_v < V, float("-inf"))
        b_depth, b_rank = depth_of(b_x, top, scale), rank_of(b_x, o_v, ID_BITS)
        m_v = b_depth < DEPTH
        m_in = m_v & (fine_bin(tl.where(m_v, b_depth, 0.0)) == i_bin)
        m_in = m_in & (b_rank >= low) & (b_rank <= high)
        found = tl.sum(m_in.to(tl.int32), axis=0)
        if found > 0:
            put_ranks(ranks, b_rank, m_in, start)
        start += found
    # other threads of this program read what was written
    tl.debug_barrier()
    return up_to - above, above, above_mass


@jit
def _load_ranks(
    ranks: tl.tensor, count: tl.tensor, top: tl.tensor, scale: tl.tensor, ID_BITS: tl.constexpr,
    HEAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """A block of `count` ranks and their masses; below them the lowest rank, without mass."""
    o_r = tl.arange(0, HEAD)
    b_rank = tl.load(ranks + o_r, o_r < count, LOWEST)
    b_depth = depth_of(value_of((b_rank >> ID_BITS).to(tl.int32)), top, scale)
    return b_rank, mass_of(tl.where(o_r < count, b_depth, DEPTH))


@jit
def _place(
    b_rank: tl.tensor, b_mass: tl.tensor, goal: tl.tensor, by_count: tl.tensor,
    ID_BITS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The rank in a block at which its count or mass first exceeds `goal`."""
    b_unit = tl.where(by_count, (b_rank != LOWEST).to(tl.int64), b_mass)
    low = tl.min(tl.where(b_rank == LOWEST, HIGHEST, b_rank), axis=0)
    high = tl.max(b_rank, axis=0)
    while low < high:
        middle = _middle(low, high, ID_BITS)
        b_in = b_rank >= middle
        is_deep = tl.sum(tl.where(b_in, b_unit, 0), axis=0) > goal
        # the nearest rank on the side of the place; complements turn a minimum into a maximum
        b_side = tl.where(b_in == is_deep, tl.where(is_deep, ~b_rank, b_rank), LOWEST)
        nearest = tl.max(b_side, axis=0)
        low, high = tl.where(is_deep, ~nearest, low), tl.where(is_deep, high, nearest)
    return high


@jit
def _least_rank(
    top: tl.tensor, warmth: tl.tensor, share: tl.tensor, ID_BITS: tl.constexpr
) -> tl.tensor:
    """The least rank of a token of at least `share` of the best one's weight; `share` > 0."""
    bound = top.to(tl.float64) + warmth * tl.log(share)
    near = tl.maximum(bound, -3e38).to(tl.float32)
    key = key_of(near) + (near.to(tl.float64) < bound).to(tl.int32)
    return key.to(tl.int64) << ID_BITS


@jit
def _draw(
    logits: tl.tensor, ranks: tl.tensor, state: tl.tensor, fine: tl.tensor, best: tl.tensor,
    top: tl.tensor, scale: tl.tensor, warmth: tl.tensor, top_k: tl.tensor, top_p: tl.tensor,
    min_p: tl.tensor, point: tl.tensor, V: tl.tensor, ID_BITS: tl.constexpr,
    CHUNK: tl.constexpr, HEAD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The rank drawn from one row: the mass of each filter's tokens, then the place of the point.

    The kept tokens are the first of the order under every filter, so the least mass decides.
    """
    b_count, kept = tl.load(state + tl.arange(0, MASS_AT)), tl.load(state + MASS_AT)
    total = tl.sum(b_count, axis=0)
    _, num_head = head_size(b_count, HEAD)
    b_rank, b_mass = _load_ranks(ranks, num_head, top, scale, ID_BITS, HEAD)
    head_mass = tl.sum(b_mass, axis=0)
    by_min = kept
    if min_p > 0:
        least = _least_rank(top, warmth, min_p, ID_BITS)
        by_min = tl.sum(tl.where(b_rank >= least, b_mass, 0), axis=0)
        # only a head whose last rank fails is known to hold all that pass
        last = tl.min(tl.where(b_rank == LOWEST, HIGHEST, b_rank), axis=0)
        if (last >= least) & (num_head < total):
            _, by_min, _, _ = _sum_row(logits, least, top, scale, V, ID_BITS, CHUNK)
    rank = best
    for i_step in range(3):
        by_count = i_step == 0
        goal = tl.where(by_count, top_k - 1, 0)
        sought = by_count & (top_k > 0) & (top_k < total)
        if i_step == 1:
            goal = tl.maximum(tl.ceil(top_p * kept.to(tl.float64)).to(tl.int64) - 1, 0)
            sought = top_p < 1.0
        if i_step == 2:
            kept = tl.minimum(kept, by_min)
            goal = tl.minimum((point * kept.to(tl.float64)).to(tl.int64), kept - 1)
            sought = goal >= 0
        if sought:
            count, above, above_mass = num_head, total * 0, total * 0
            start = total * 0
            if tl.where(by_count, num_head, head_mass) <= goal:
                count, above, above_mass = _narrow(
                    logits, ranks + HEAD, fine, best, goal, by_count, top, scale, V, ID_BITS, CHUNK,
                    HEAD,
                )  # fmt: skip
                start += HEAD
            b_near, b_share = _load_ranks(ranks + start, count, top, scale, ID_BITS, HEAD)
            goal -= tl.where(by_count, above, above_mass)
            rank = _place(b_near, b_share, goal, by_count, ID_BITS)
            kept = above_mass + tl.sum(tl.where(b_near >= rank, b_share, 0), axis=0)
    return rank


@jit
def draw_kernel(
    logits: tl.tensor, best: tl.tensor, state: tl.tensor, fine: tl.tensor, ranks: tl.tensor,
    out: tl.tensor, temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, min_p: tl.tensor,
    points: tl.tensor, stride: tl.tensor, chunks: tl.tensor, V: tl.tensor,
    ID_BITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, HEAD: tl.constexpr,
) -> None:  # fmt: skip
    """The token of one row per program."""
    i_s = tl.program_id(0).to(tl.int64)
    rank, top, scale, is_drawn = row_facts(best, temperature, i_s, chunks, ID_BITS, CHUNKS)
    key = (rank >> ID_BITS).to(tl.int32)
    is_finite = (key < INFINITY) & (key > NOTHING)
    if is_drawn:
        rank = _draw(
            logits + i_s * stride, ranks + i_s * (2 * HEAD), state + i_s * STATE,
            fine + i_s * (2 * FINE), rank, top, scale,
            tl.load(temperature + i_s).to(tl.float64), tl.load(top_k + i_s).to(tl.int64),
            tl.load(top_p + i_s).to(tl.float64), tl.load(min_p + i_s).to(tl.float64),
            tl.load(points + i_s).to(tl.float64), V, ID_BITS, CHUNK, HEAD,
        )  # fmt: skip
    token = (1 << ID_BITS) - 1 - (rank & ((1 << ID_BITS) - 1))
    tl.store(out + i_s, tl.where(is_finite, token, -1))
