"""paged_attention against a dense fp64 loop over every query and head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch

from epd_kernels import paged_attention
from epd_kernels.launch import attention_splits
from epd_kernels.paged_attention import paged_attention_ref


@dataclass(frozen=True)
class Case:
    """Sequences as (q_len, seq_len), and the shape of heads and blocks."""

    seqs: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    block: int = 16

    def __str__(self) -> str:
        seqs = "+".join(f"{q}of{n}" for q, n in self.seqs)
        return f"{seqs}-h{self.heads}kv{self.kv_heads}d{self.dim}b{self.block}"


class Batch:
    """A paged batch whose unused slots and unused table entries would be noticed if read."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        blocks_of = [-(-n // case.block) for _, n in case.seqs]
        num_blocks = sum(blocks_of) + 3
        shape = (num_blocks, case.block, case.kv_heads, case.dim)
        k_cache = torch.full(shape, math.nan, dtype=dtype)
        v_cache = torch.full(shape, math.nan, dtype=dtype)
        # the last block is never mapped: table entries past a sequence lead there
        order = torch.randperm(num_blocks - 1, generator=rng).tolist()
        tables = torch.full((len(case.seqs), max(blocks_of) + 2), num_blocks - 1)
        self.k, self.v = [], []
        for s, (_, n) in enumerate(case.seqs):
            k = torch.randn(n, case.kv_heads, case.dim, generator=rng).to(dtype)
            v = torch.randn(n, case.kv_heads, case.dim, generator=rng).to(dtype)
            for b in range(blocks_of[s]):
                tables[s, b] = block = order.pop()
                rows = slice(b * case.block, (b + 1) * case.block)
                k_cache[block, : len(k[rows])] = k[rows]
                v_cache[block, : len(v[rows])] = v[rows]
            self.k.append(k)
            self.v.append(v)
        q_lens = [q for q, _ in case.seqs]
        self.bounds = [0, *accumulate(q_lens)]
        self.q = torch.randn(self.bounds[-1], case.heads, case.dim, generator=rng).to(dtype)
        self.scale = case.dim**-0.5
        self.args = [x.to(device) for x in (self.q, k_cache, v_cache)]
        self.options = {
            "block_tables": tables.int().to(device),
            "cu_seqlens_q": torch.tensor(self.bounds, dtype=torch.int32, device=device),
            "seq_lens": torch.tensor([n for _, n in case.seqs], dtype=torch.int32, device=device),
            "scale": self.scale,
            "max_seqlen_q": max(q_lens),
            "max_seqlen_k": max(n for _, n in case.seqs),
        }


def dense(batch: Batch, limits: torch.Tensor | None = None) -> torch.Tensor:
    """The definition: softmax over the visible prefix of each query, in fp64, one at a time."""
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    group = batch.q.shape[1] // batch.k[0].shape[1]
    for s, (k, v) in enumerate(zip(batch.k, batch.v, strict=True)):
        first, last = batch.bounds[s], batch.bounds[s + 1]
        for row in range(first, last):
            visible = max(len(k) - (last - first) + (row - first) + 1, 0)
            if limits is not None:
                visible = min(max(int(limits[row]), 0), len(k))
            for h in range(batch.q.shape[1]):
                if visible:
                    keys = k[:visible, h // group].double()
                    weights = (keys @ batch.q[row, h].double() * batch.scale).softmax(0)
                    out[row, h] = weights @ v[:visible, h // group].double()
    return out


DECODE = [
    Case(((1, 1),)),
    Case(((1, 1), (1, 17), (1, 63), (1, 16), (1, 32), (1, 15))),
    Case(((1, 40), (1, 0), (1, 5))),
    Case(((1, 1), (0, 9), (1, 33)), heads=2, kv_heads=2),
    Case(((1, 33), (1, 64)), heads=8, kv_heads=2, block=8),
    Case(((1, 31), (1, 65)), heads=8, kv_heads=1, dim=16, block=32),
    Case(((1, 20), (1, 3)), heads=6, kv_heads=2, dim=24),
]
PREFILL = [
    Case(((1, 1), (17, 17), (63, 63))),
    Case(((16, 32), (1, 16), (15, 31), (2, 17))),
    Case(((5, 40), (33, 33), (1, 48)), heads=8, kv_heads=2, block=8),
    Case(((7, 39), (32, 64)), heads=8, kv_heads=1, dim=16, block=32),
    Case(((1, 12), (0, 7), (9, 9)), heads=2, kv_heads=2, dim=48),
    Case(((3, 1), (2, 5), (2, 0))),
    Case(((18, 50),), heads=6, kv_heads=2, dim=80),
]


@pytest.mark.parametrize("case", [*DECODE, *PREFILL], ids=str)
def test_equals_dense(case, backend, assert_close):
    run = backend.op("paged_attention", "paged_attention")
    for dtype in backend.dtypes:
        batch = Batch(case, dtype, backend.device)
        assert_close(run(*batch.args, **batch.options), dense(batch))


@pytest.mark.parametrize("length", [1024, 1500])
def test_split_decode_equals_dense(length, backend, assert_close):
    """Several splits, some of them empty for the short sequences."""
    case = Case(((1, length), (1, 1), (1, 0)), heads=2, kv_heads=1, dim=16)
    batch = Batch(case, torch.float32, backend.device)
    assert splits_of(3, length, occupancy=2) == 2
    run = backend.op("paged_attention", "paged_attention")
    assert_close(run(*batch.args, **batch.options), dense(batch))


def test_bounds_may_exceed_lengths(backend, assert_close):
    """A captured graph launches for its bucket's longest sequence, not this batch's."""
    batch = Batch(DECODE[1], torch.float32, backend.device)
    run = backend.op("paged_attention", "paged_attention")
    for bound in (64, 600, 4096):
        out = run(*batch.args, **{**batch.options, "max_seqlen_k": bound})
        assert_close(out, dense(batch))
    out = run(*batch.args, **{**batch.options, "max_seqlen_q": 40})
    assert_close(out, dense(batch))


def spans(case: Case, seed: int) -> torch.Tensor:
    """Limits of random bidirectional spans: every query of one sees up to its end, or nothing."""
    rng = torch.Generator().manual_seed(seed)
    limits = []
    for q_len, seq_len in case.seqs:
        mine = torch.arange(q_len) + 1 + seq_len - q_len
        start = 0
        while start < q_len:
            stop = start + int(torch.randint(1, 9, (), generator=rng))
            mine[start:stop] = mine[start:stop].max()
            start = stop
        if q_len > 2:
            mine[1], mine[2] = -3, seq_len + 100
        limits.append(mine)
    return torch.cat(limits).int()


@pytest.mark.parametrize("case", [*DECODE, *PREFILL], ids=str)
def test_limits_equal_the_brute_force_mask(case, backend, assert_close):
    """Spans that see one another, rows that see nothing, and limits past the end."""
    run = backend.op("paged_attention", "paged_attention")
    for seed, dtype in enumerate(backend.dtypes):
        batch = Batch(case, dtype, backend.device)
        limits = spans(case, seed)
        if max(q for q, _ in case.seqs) == 1:
            limits = (limits - seed * 7).to(torch.int32)
        out = run(*batch.args, **batch.options, limits=limits.to(backend.device))
        assert_close(out, dense(batch, limits))


def test_limits_bound_every_split_of_decoding(backend, assert_close):
    batch = Batch(Case(((1, 1500), (1, 1500), (1, 0), (1, 1100)), 2, 1, 16), torch.float32,
                  backend.device)  # fmt: skip
    limits = torch.tensor([1500, 3, 4, 701], dtype=torch.int32)
    run = backend.op("paged_attention", "paged_attention")
    out = run(*batch.args, **batch.options, limits=limits.to(backend.device))
    assert_close(out, dense(batch, limits))


@pytest.mark.parametrize("limited", [False, True])
def test_few_queries_behind_a_long_prefix_are_split(limited, backend, assert_close):
    """A chunk's tiles alone would leave the device idle; rows may see nothing of a split."""
    case = Case(((8, 1100),), 2, 1, 16)
    batch = Batch(case, torch.float32, backend.device)
    assert splits_of(1, 1100, occupancy=1) == 2
    limits = torch.tensor([1100, 3, 0, 600, 599, 601, 1099, 5000], dtype=torch.int32)
    given = {"limits": limits.to(backend.device)} if limited else {}
    run = backend.op("paged_attention", "paged_attention")
    out = run(*batch.args, **batch.options, **given)
    assert_close(out, dense(batch, limits if limited else None))


def test_a_step_may_hold_one_query_beside_many(backend, assert_close):
    """Each kind has its kernel, and both are split."""
    case = Case(((1, 1100), (8, 1100), (1, 0), (1, 520), (0, 40)), 2, 1, 16)
    batch = Batch(case, torch.float32, backend.device)
    run = backend.op("paged_attention", "paged_attention")
    assert_close(run(*batch.args, **batch.options), dense(batch))


def test_causal_limits_change_nothing(backend):
    batch = Batch(PREFILL[1], torch.float32, backend.device)
    run = backend.op("paged_attention", "paged_attention")
    limits = torch.cat([torch.arange(q) + 1 + n - q for q, n in PREFILL[1].seqs]).int()
    with_limits = run(*batch.args, **batch.options, limits=limits.to(backend.device))
    torch.testing.assert_close(with_limits, run(*batch.args, **batch.options))


def test_views_and_layer_slices(backend, assert_close):
    """q as a slice of a fused qkv row; caches as one layer of a larger tensor."""
    batch = Batch(PREFILL[1], torch.float32, backend.device)
    q, k_cache, v_cache = batch.args
    fused = torch.full((len(q), q.shape[1] + 4, q.shape[2]), math.nan, device=q.device)
    fused[:, 2:-2] = q
    layers = torch.stack((k_cache, torch.full_like(k_cache, math.nan), v_cache), dim=1)
    run = backend.op("paged_attention", "paged_attention")
    out = run(fused[:, 2:-2], layers[:, 0], layers[:, 2], **batch.options)
    assert_close(out, dense(batch))


def test_no_queries(backend):
    batch = Batch(Case(((0, 5),)), torch.float32, backend.device)
    options = {**batch.options, "max_seqlen_q": 1}
    out = backend.op("paged_attention", "paged_attention")(*batch.args, **options)
    assert out.shape == (0, 4, 32)


def test_two_runs_are_bit_equal(backend):
    batch = Batch(PREFILL[2], torch.float32, backend.device)
    run = backend.op("paged_attention", "paged_attention")
    assert torch.equal(run(*batch.args, **batch.options), run(*batch.args, **batch.options))


def test_cpu_tensors_take_the_reference():
    batch = Batch(PREFILL[1], torch.float32, "cpu")
    expected = paged_attention_ref(*batch.args, **batch.options)
    assert torch.equal(paged_attention(*batch.args, **batch.options), expected)


def splits_of(programs: int, length: int, *, occupancy: int, warps: int = 4) -> int:
    """On a CPU, which counts as a device of four multiprocessors."""
    return attention_splits(torch.device("cpu"), programs=programs, max_seqlen_k=length,
                            occupancy=occupancy, num_warps=warps)  # fmt: skip


@pytest.mark.parametrize("programs", [1, 8, 264, 5000])
@pytest.mark.parametrize("length", [1, 511, 512, 513, 32768])
def test_splits_are_bounded(programs, length):
    """Two rounds of eight programs at most, and 128 positions per warp at least."""
    splits = splits_of(programs, length, occupancy=2)
    assert splits == 1 or (splits * programs <= 16 and splits * 512 <= length)


def test_splits_fill_whole_rounds():
    """Twelve programs are resident on a device of four multiprocessors."""
    assert [splits_of(2, n, occupancy=3) for n in (511, 1024, 2048, 32768)] == [1, 2, 4, 6]
    expected = [12, 4, 2, 3, 1, 1, 1]
    assert [splits_of(n, 32768, occupancy=3) for n in (1, 3, 5, 8, 12, 13, 100)] == expected
    assert splits_of(2, 512, occupancy=3, warps=1) == 4


LARGE = [
    Case(tuple((1, n) for n in (1, 127, 128, 1000, 4097)), heads=32, kv_heads=8, dim=128),
    Case(((1, 8191),), heads=28, kv_heads=4, dim=128),
    Case(((1, 700), (1, 2048)), heads=16, kv_heads=16, dim=96),
    Case(((255, 255), (129, 640), (1, 300)), heads=32, kv_heads=8, dim=128),
    Case(((300, 300), (40, 1000)), heads=28, kv_heads=4, dim=128, block=32),
    Case(((200, 200),), heads=8, kv_heads=1, dim=64, block=8),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_equals_reference(case, dtype, gpu, assert_close):
    batch = Batch(case, dtype, gpu.device)
    out = paged_attention(*batch.args, **batch.options)
    wide = [x.double().cpu() for x in batch.args]
    options = {k: x.cpu() if torch.is_tensor(x) else x for k, x in batch.options.items()}
    assert_close(out, paged_attention_ref(*wide, **options))


@pytest.mark.gpu
def test_graph_replay_follows_new_lengths(gpu, assert_close):
    """One captured decode step serves other lengths and tables of the same bucket."""
    first = Batch(Case(((1, 100), (1, 7))), torch.float16, gpu.device)
    options = {**first.options, "max_seqlen_k": 1024}
    paged_attention(*first.args, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*first.args, **options)
    second = Batch(Case(((1, 12), (1, 109))), torch.float16, gpu.device, seed=1)
    for name in ("block_tables", "seq_lens"):
        options[name][..., : second.options[name].shape[-1]].copy_(second.options[name])
    for old, new in zip(first.args, second.args, strict=True):
        old[: len(new)].copy_(new[: len(old)])
    graph.replay()
    assert_close(out, dense(second))
