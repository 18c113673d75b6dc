"""Tokens of a row of logits as ranks and masses, and the ranks of the likeliest ones put together.

Every token has a rank, a 64-bit integer: the order-preserving image of its fp32 logit, then its id
reversed. No two are equal, and falling rank is the order of a draw. Its mass is 2^40 w rounded
down, w = 2^-depth, depth = (best - x) log2(e) / temperature; a token of depth 40 or more has none.
Sums of masses are exact integers, so nothing depends on the order in which programs add them.

    best    best rank of each chunk of the row
    count   tokens by bins of depth, and the mass of all, over all chunks
    head    ranks of the first whole bins that hold at most HEAD tokens together, side by side; of
            flat rows, whose places may lie behind them, mass and tokens by fine bins of depth

Rows that are not drawn from, greedy or not finite, end after the first.
"""

from __future__ import annotations

from .launch import constant, jit, tl

__all__ = ["DEPTH", "FINE", "FINE_SIZE", "HIGHEST", "INFINITY", "LOWEST", "MASS_AT", "NOTHING",
           "STATE", "STATE_SIZE", "best_kernel", "count_kernel", "depth_of", "fine_bin",
           "head_kernel", "head_size", "key_of", "mass_of", "put_ranks", "rank_of", "row_facts",
           "value_of"]  # fmt: skip

STATE_SIZE = 128  # integers per row: a count per bin, then the two named below
STATE, _BINS = constant(STATE_SIZE), constant(64)
MASS_AT, _FILLED_AT = constant(64), constant(65)
FINE_SIZE = 1024  # bins of a flat row, whose masses come first, then their counts
FINE = constant(FINE_SIZE)
DEPTH = constant(40.0)
_UNIT = constant(float(1 << 40))
LOWEST, HIGHEST = constant(-(1 << 63)), constant((1 << 63) - 1)
_NAN, INFINITY, NOTHING = constant(0x7FFFFFFF), constant(0x7F800000), constant(-0x7F800001)


@jit
def key_of(x: tl.tensor) -> tl.tensor:
    """int32 in the order of fp32 `x`: both zeros 0, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, _NAN, tl.where(x == 0, 0, key))


@jit
def value_of(key: tl.tensor) -> tl.tensor:
    """The fp32 number of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def rank_of(x: tl.tensor, token: tl.tensor, ID_BITS: tl.constexpr) -> tl.tensor:
    """The rank of a token: below 2^ID_BITS, the lower the id the higher."""
    return (key_of(x).to(tl.int64) << ID_BITS) + ((1 << ID_BITS) - 1 - token).to(tl.int64)


@jit
def depth_of(x: tl.tensor, top: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Halvings of the best token's weight at logit `x`; rises as x falls, whatever is rounded."""
    return (top - x) * scale


@jit
def mass_of(depth: tl.tensor) -> tl.tensor:
    """The integer mass at a depth: positive below `DEPTH`, else 0."""
    mass = (tl.exp2(-depth) * _UNIT).to(tl.int64)
    return tl.where(depth < DEPTH, tl.maximum(mass, 1), 0)


@jit
def _bin(depth: tl.tensor) -> tl.tensor:
    """The bin of a depth below `DEPTH`."""
    return tl.minimum((depth * (_BINS / DEPTH)).to(tl.int32), _BINS - 1)


@jit
def fine_bin(depth: tl.tensor) -> tl.tensor:
    """The fine bin of a depth below `DEPTH`."""
    return tl.minimum((depth * (FINE / DEPTH)).to(tl.int32), FINE - 1)


@jit
def best_kernel(
    logits: tl.tensor, best: tl.tensor, state: tl.tensor, fine: tl.tensor, stride: tl.tensor,
    V: tl.tensor, ID_BITS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """The best rank of one chunk per program; the first of a row clears its state and bins."""
    i_s, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_c * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(logits + i_s * stride + o_v, o_v < V, 0.0)
    b_rank = tl.where(o_v < V, rank_of(b_x, o_v, ID_BITS), LOWEST)
    tl.store(best + i_s * tl.num_programs(1) + i_c, tl.max(b_rank, axis=0))
    if i_c == 0:
        o_f = tl.arange(0, STATE)
        tl.store(state + i_s * STATE + o_f, tl.zeros((STATE,), tl.int64))
        o_f = tl.arange(0, 2 * FINE)
        tl.store(fine + i_s * (2 * FINE) + o_f, tl.zeros((2 * FINE,), tl.int64))


@jit
def row_facts(
    best: tl.tensor, temperature: tl.tensor, i_s: tl.tensor, count: tl.tensor,
    ID_BITS: tl.constexpr, CHUNKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of a row: its best rank, that logit, log2(e) / temperature, and whether it is drawn."""
    o_c = tl.arange(0, CHUNKS)
    warmth = tl.load(temperature + i_s).to(tl.float64)
    rank = tl.max(tl.load(best + i_s * count + o_c, o_c < count, LOWEST), axis=0)
    key = (rank >> ID_BITS).to(tl.int32)
    is_drawn = (warmth > 0) & (key < INFINITY) & (key > NOTHING)
    scale = tl.minimum(1.4426950408889634 / tl.where(is_drawn, warmth, 1.0), 1e30)
    return rank, value_of(key), scale.to(tl.float32), is_drawn


@jit
def count_kernel(
    logits: tl.tensor, best: tl.tensor, state: tl.tensor, temperature: tl.tensor,
    stride: tl.tensor, V: tl.tensor, ID_BITS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    """Tokens of one chunk by depth, and their mass, added to the state of the row."""
    i_s, count = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    o_v = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    # under way while the facts are read
    b_x = tl.load(logits + i_s * stride + o_v, o_v < V, float("-inf"))
    _, top, scale, is_drawn = row_facts(best, temperature, i_s, count, ID_BITS, CHUNKS)
    if is_drawn:
        b_depth = depth_of(b_x, top, scale)
        m_v = b_depth < DEPTH
        b_bin = _bin(tl.where(m_v, b_depth, 0.0))
        b_count = tl.histogram(b_bin, _BINS, mask=m_v).to(tl.int64)
        o_b = tl.arange(0, _BINS)
        tl.atomic_add(state + i_s * STATE + o_b, b_count, mask=b_count != 0, sem="relaxed")
        mass = tl.sum(mass_of(b_depth), axis=0)
        tl.atomic_add(state + i_s * STATE + MASS_AT, mass, sem="relaxed")


@jit
def head_size(b_count: tl.tensor, HEAD: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """How many bins of these counts the head of a row takes, and how many tokens they hold."""
    b_reached = tl.cumsum(b_count, axis=0)
    b_fits = b_reached <= HEAD
    return tl.sum(b_fits.to(tl.int32), axis=0), tl.max(tl.where(b_fits, b_reached, 0), axis=0)


@jit
def put_ranks(ranks: tl.tensor, b_rank: tl.tensor, m_v: tl.tensor, start: tl.tensor) -> None:
    """Write the ranks that the mask leaves from `start` on."""
    b_one = m_v.to(tl.int32)
    tl.store(ranks + start + tl.cumsum(b_one, axis=0) - b_one, b_rank, m_v)


@jit
def _is_flat(
    b_count: tl.tensor, mass: tl.tensor, bins: tl.tensor, num_head: tl.tensor, top_k: tl.tensor,
    top_p: tl.tensor, point: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Whether a place may lie behind the head: not where even the most that the other bins can
    weigh leaves the head enough.
    """
    o_b = tl.arange(0, _BINS)
    total = tl.sum(b_count, axis=0)
    b_most = b_count.to(tl.float32) * tl.exp2(-(o_b.to(tl.float32) * (DEPTH / _BINS)))
    tail = tl.sum(tl.where(o_b < bins, 0.0, b_most), axis=0).to(tl.float64) * (1.001 * _UNIT)
    reach = tl.where(top_p < 1.0, top_p, point) * mass
    is_far = reach > mass * (1.0 - 1e-12) - tail
    is_behind = tl.where((top_k > 0) & (top_k < total), top_k > num_head, is_far)
    return is_behind & (num_head < total)


@jit
def head_kernel(
    logits: tl.tensor, best: tl.tensor, state: tl.tensor, fine: tl.tensor, ranks: tl.tensor,
    temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, points: tl.tensor,
    stride: tl.tensor, V: tl.tensor, ID_BITS: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD: tl.constexpr,
) -> None:  # fmt: skip
    """Ranks of one chunk that belong to the head of its row, in no order among chunks."""
    i_s, count = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    o_v = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(logits + i_s * stride + o_v, o_v < V, float("-inf"))
    state += i_s * STATE
    b_count, mass = tl.load(state + tl.arange(0, _BINS)), tl.load(state + MASS_AT).to(tl.float64)
    k, p = tl.load(top_k + i_s).to(tl.int64), tl.load(top_p + i_s).to(tl.float64)
    point = tl.load(points + i_s).to(tl.float64)
    _, top, scale, is_drawn = row_facts(best, temperature, i_s, count, ID_BITS, CHUNKS)
    if is_drawn:
        bins, num_head = head_size(b_count, HEAD)
        b_depth = depth_of(b_x, top, scale)
        m_v = b_depth < DEPTH
        m_head = m_v & (_bin(tl.where(m_v, b_depth, 0.0)) < bins)
        found = tl.sum(m_head.to(tl.int64), axis=0)
        if found > 0:
            start = tl.atomic_add(state + _FILLED_AT, found, sem="relaxed")
            put_ranks(ranks + i_s * (2 * HEAD), rank_of(b_x, o_v, ID_BITS), m_head, start)
        if _is_flat(b_count, mass, bins, num_head, k, p, point):
            p_fine = fine + i_s * (2 * FINE) + fine_bin(tl.where(m_v, b_depth, 0.0))
            tl.atomic_add(p_fine, mass_of(b_depth), mask=m_v, sem="relaxed")
            tl.atomic_add(p_fine + FINE, m_v.to(tl.int64), mask=m_v, sem="relaxed")
