"""Attention over coded KV against the dense fp64 loop over what the codes mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from epd_kernels import KVFormat, quantized_attention
from epd_kernels.launch import INTERPRETED
from epd_kernels.quantized_attention import CodedConfig, quantized_attention_ref
from epd_kernels.widened_kv import attend_widened, widen_kv, widening_pays

from .coded_batches import CodedBatch, dense, poisoned_cache

FORMATS = pytest.mark.parametrize("target", list(KVFormat), ids=lambda f: f.value)
RATIO = {torch.float32: 1e-3, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}

DECODE = [
    {"seqs": ((1, 1),)},
    {"seqs": ((1, 1), (1, 17), (1, 63), (1, 16), (1, 32), (1, 15))},
    {"seqs": ((1, 40), (1, 0), (1, 5))},
    {"seqs": ((1, 1), (0, 9), (1, 33)), "heads": 2, "kv_heads": 2},
    {"seqs": ((1, 33), (1, 64)), "heads": 8, "kv_heads": 2, "block": 8},
    {"seqs": ((1, 31), (1, 65)), "heads": 8, "kv_heads": 1, "dim": 16, "block": 32},
    {"seqs": ((1, 20), (1, 3)), "heads": 6, "kv_heads": 2, "dim": 24},
]
PREFILL = [
    {"seqs": ((1, 1), (17, 17), (35, 35))},
    {"seqs": ((16, 32), (1, 16), (15, 31), (2, 17))},
    {"seqs": ((5, 40), (33, 33), (1, 48)), "heads": 8, "kv_heads": 2, "block": 8},
    {"seqs": ((3, 1), (2, 5), (2, 0))},
    {"seqs": ((18, 50),), "heads": 6, "kv_heads": 2, "dim": 80},
]


def name(case):
    return "+".join(f"{q}of{n}" for q, n in case["seqs"])


def close(actual, expected):
    reference = expected.double()
    error = (actual.double().cpu() - reference).norm()
    assert error <= RATIO[actual.dtype] * reference.norm() + 1e-30, float(error / reference.norm())


@FORMATS
@pytest.mark.parametrize("case", [*DECODE, *PREFILL], ids=name)
def test_equals_dense(case, target, backend):
    """Unused slots and table entries are NaN or lead to NaN."""
    run = backend.op("quantized_attention", "quantized_attention")
    for dtype in backend.dtypes[1:]:
        batch = CodedBatch(target, dtype, backend.device, **case)
        close(run(*batch.args, **batch.options), dense(batch))


@FORMATS
@pytest.mark.parametrize("length", [1024, 1500])
def test_split_decode_equals_dense(length, target, backend):
    """Several splits, some of them empty for the short sequences."""
    seqs = ((1, length), (1, 1), (1, 0))
    batch = CodedBatch(target, torch.float32, backend.device, seqs, heads=2, kv_heads=1, dim=16)
    run = backend.op("quantized_attention", "quantized_attention")
    close(run(*batch.args, **batch.options), dense(batch))


@FORMATS
def test_bounds_may_exceed_lengths(target, backend):
    batch = CodedBatch(target, torch.float32, backend.device, DECODE[1]["seqs"])
    run = backend.op("quantized_attention", "quantized_attention")
    for change in ({"max_seqlen_k": 600}, {"max_seqlen_k": 4096}, {"max_seqlen_q": 40}):
        close(run(*batch.args, **{**batch.options, **change}), dense(batch))


@FORMATS
def test_small_and_large_values_keep_their_accuracy(target, backend):
    """fp16 inside the kernel neither overflows nor flushes what the codes can hold."""
    run = backend.op("quantized_attention", "quantized_attention")
    for q_size, k_size, v_size in ((1e-3, 1e3, 1e-4), (3e3, 1e-3, 2e2), (1.0, 1.0, 1e-5)):
        batch = CodedBatch(target, torch.float32, backend.device, ((1, 50), (4, 20)),
                           sizes=(q_size, k_size, v_size))  # fmt: skip
        close(run(*batch.args, **batch.options), dense(batch))


def some_limits(batch: CodedBatch) -> torch.Tensor:
    """Per row anything from nothing to more than there is."""
    longest = batch.options["max_seqlen_k"]
    rng = torch.Generator().manual_seed(longest)
    return torch.randint(-2, longest + 9, (len(batch.q),), generator=rng, dtype=torch.int32)


@FORMATS
@pytest.mark.parametrize("case", [DECODE[1], DECODE[3], PREFILL[1], PREFILL[2]], ids=name)
def test_limits_equal_the_brute_force_mask(case, target, backend):
    batch = CodedBatch(target, torch.float32, backend.device, **case)
    limits = some_limits(batch)
    run = backend.op("quantized_attention", "quantized_attention")
    close(run(*batch.args, **batch.options, limits=limits.to(backend.device)), dense(batch, limits))


@FORMATS
def test_a_step_may_hold_one_query_beside_many(target, backend):
    seqs = ((1, 1100), (8, 1100), (1, 0), (1, 520), (0, 40))
    batch = CodedBatch(target, torch.float32, backend.device, seqs, heads=2, kv_heads=1, dim=16)
    run = backend.op("quantized_attention", "quantized_attention")
    close(run(*batch.args, **batch.options), dense(batch))


@FORMATS
def test_limits_bound_every_split_of_decoding(target, backend):
    batch = CodedBatch(target, torch.float32, backend.device, ((1, 1100), (1, 900), (1, 0)),
                       heads=2, kv_heads=1, dim=16)  # fmt: skip
    limits = torch.tensor([701, 3, 5], dtype=torch.int32)
    run = backend.op("quantized_attention", "quantized_attention")
    close(run(*batch.args, **batch.options, limits=limits.to(backend.device)), dense(batch, limits))


def test_decode_equals_the_last_row_of_prefill(backend):
    """A token sees the same whether it comes alone or at the end of a chunk."""
    batch = CodedBatch(KVFormat.INT4, torch.float32, backend.device, ((8, 40),))
    run = backend.op("quantized_attention", "quantized_attention")
    whole = run(*batch.args, **batch.options)
    one = torch.tensor([0, 1], dtype=torch.int32, device=backend.device)
    options = {**batch.options, "cu_seqlens_q": one, "max_seqlen_q": 1}
    last = run(batch.args[0][-1:], *batch.args[1:], **options)
    close(last[0], whole[-1].cpu())


@FORMATS
def test_views_and_head_major_memory(target, backend):
    """q as a slice of a fused qkv row; caches whose memory runs over rows before heads."""
    batch = CodedBatch(target, torch.float32, backend.device, PREFILL[1]["seqs"])
    q, *caches = batch.args
    fused = torch.full((len(q), q.shape[1] + 4, q.shape[2]), math.nan, device=q.device)
    fused[:, 2:-2] = q
    swapped = [
        type(c)(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in c)) for c in caches
    ]
    run = backend.op("quantized_attention", "quantized_attention")
    close(run(fused[:, 2:-2], *swapped, **batch.options), dense(batch))


def test_no_queries(backend):
    batch = CodedBatch(KVFormat.INT4, torch.float32, backend.device, ((0, 5),))
    run = backend.op("quantized_attention", "quantized_attention")
    assert run(*batch.args, **{**batch.options, "max_seqlen_q": 1}).shape == (0, 4, 32)


def test_runs_are_bit_equal(backend):
    batch = CodedBatch(KVFormat.INT4, torch.float32, backend.device, ((1, 1030), (1, 7)))
    run = backend.op("quantized_attention", "quantized_attention")
    first = run(*batch.args, **batch.options)
    for _ in range(100 if backend.name == "gpu" else 1):
        assert torch.equal(run(*batch.args, **batch.options), first)


KERNELS = pytest.mark.parametrize(
    "backend", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)


@KERNELS
@FORMATS
@pytest.mark.parametrize("case", [*DECODE[1:3], *PREFILL], ids=name)
def test_widened_equals_dense(case, target, backend):
    """The scratch is NaN where nothing is written, as are the slots that are not named."""
    for dtype in backend.dtypes[1:]:
        batch = CodedBatch(target, dtype, backend.device, **case)
        close(attend_widened(*batch.args, **batch.options), dense(batch))
    longer = {**batch.options, "max_seqlen_k": 600}
    close(attend_widened(*batch.args, **longer), dense(batch))
    limits = some_limits(batch)
    out = attend_widened(*batch.args, **batch.options, limits=limits.to(backend.device))
    close(out, dense(batch, limits))


@KERNELS
@FORMATS
@pytest.mark.parametrize("rows_first", [True, False])
def test_widened_rows_are_what_the_codes_mean(rows_first, target, backend):
    """Bit for bit; and nothing is written past the length of a sequence."""
    batch = CodedBatch(target, torch.float32, backend.device, ((1, 70), (1, 0), (1, 33)), dim=24)
    caches = batch.args[1:]
    if not rows_first:
        caches = [
            type(c)(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in c)) for c in caches
        ]
    tables = batch.options["block_tables"][:, :5]
    out = widen_kv(*caches, block_tables=tables, seq_lens=batch.options["seq_lens"],
                   dtype=torch.float32)  # fmt: skip
    for found, kept in zip(out.cpu().view(2, 3, 80, 2, 24), (batch.k, batch.v), strict=True):
        for rows, expected in zip(found, kept, strict=True):
            assert torch.equal(rows[: len(expected)], expected)
            assert bool(rows[len(expected) :].isnan().all())


def test_widening_is_for_many_queries_and_a_scratch_that_fits():
    cache = poisoned_cache(KVFormat.INT4, 1, 16, 8, 128)

    def pays(queries: int, num_seqs: int, length: int) -> bool:
        q = torch.zeros(queries, 1, 1, dtype=torch.bfloat16)
        return widening_pays(q, cache, num_seqs=num_seqs, max_seqlen_k=length)

    assert pays(16, 1, 8192) and not pays(15, 1, 8192)
    assert pays(64, 4, 16384) and not pays(64, 5, 2048)
    assert pays(4096, 1, 65536) and not pays(4096, 1, 65537)


def test_cpu_tensors_take_the_reference():
    batch = CodedBatch(KVFormat.INT4, torch.float32, "cpu", PREFILL[1]["seqs"])
    expected = quantized_attention_ref(*batch.args, **batch.options)
    assert torch.equal(quantized_attention(*batch.args, **batch.options), expected)


@pytest.mark.gpu
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"seqs": tuple((1, n) for n in (1, 127, 128, 1000, 4097)), "heads": 32, "kv_heads": 8},
        {"seqs": ((1, 8191),), "heads": 28, "kv_heads": 4},
        {"seqs": ((1, 700), (1, 2048)), "heads": 16, "kv_heads": 16, "dim": 96},
        {"seqs": ((255, 255), (129, 640), (1, 300), (1, 40)), "heads": 32, "kv_heads": 8},
        {"seqs": ((200, 200),), "heads": 8, "kv_heads": 1, "dim": 64, "block": 8},
    ],
    ids=name,
)
def test_large_equals_reference(case, dtype, target, gpu):
    batch = CodedBatch(target, dtype, gpu.device, **{"dim": 128, **case})
    out = quantized_attention(*batch.args, **batch.options)
    wide = [batch.args[0].double().cpu(), *(type(c)(*(t.cpu() for t in c)) for c in batch.args[1:])]
    options = {k: x.cpu() if torch.is_tensor(x) else x for k, x in batch.options.items()}
    close(out, quantized_attention_ref(*wide, **options))


@pytest.mark.gpu
def test_inline_assembly_equals_the_portable_twin(gpu):
    """Bit for bit, in decode and prefill: both feed the same operands to the same products."""
    if INTERPRETED:
        pytest.skip("the interpreter has no assembly")
    run = gpu.op("quantized_attention", "quantized_attention")
    for seqs in (((1, 4000), (1, 77)), ((70, 300),)):
        batch = CodedBatch(KVFormat.INT4, torch.bfloat16, gpu.device, seqs,
                           heads=32, kv_heads=8, dim=128)  # fmt: skip
        a, b = (
            run(*batch.args, **batch.options, config=CodedConfig(64, 64, 4, 2, use_ptx=use_ptx))
            for use_ptx in (True, False)
        )
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_every_nibble_reaches_the_matrix_unit(gpu):
    """One-hot queries read each code back: subnormal operands are not flushed."""
    pairs = torch.tensor(list(itertools.product(range(16), range(16))), dtype=torch.uint8)
    codes = (pairs[:, 0] | pairs[:, 1] << 4).view(16, 16, 1, 1).expand(16, 16, 1, 16)
    scales = torch.ones(16, 16, 1)
    batch = CodedBatch(KVFormat.INT4, torch.float32, gpu.device, ((1, 256),),
                       heads=1, kv_heads=1, dim=32)  # fmt: skip
    k, v = batch.args[1:]
    tables = torch.arange(16, dtype=torch.int32, device="cuda").view(1, 16)
    k.codes[:16], k.scales[:16] = codes.to("cuda"), scales.to("cuda")
    v.codes[:16], v.scales[:16] = codes.to("cuda"), scales.to("cuda")
    q = torch.zeros(1, 1, 32, device="cuda")
    for channel, nibble in ((0, 0), (16, 1)):
        q.zero_()
        q[0, 0, channel] = 1.0
        out = quantized_attention(
            q, k, v, **{**batch.options, "block_tables": tables, "scale": 1.0}
        )
        weights = pairs[:, nibble].double().softmax(0)
        expected = torch.cat([
            (weights * pairs[:, half].double()).sum().expand(16) for half in (0, 1)
        ])  # fmt: skip
        close(out[0, 0], expected)


@pytest.mark.gpu
def test_graph_replay_follows_new_lengths(gpu):
    first = CodedBatch(KVFormat.INT4, torch.float16, gpu.device, ((1, 100), (1, 7)))
    options = {**first.options, "max_seqlen_k": 1024}
    quantized_attention(*first.args, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantized_attention(*first.args, **options)
    second = CodedBatch(KVFormat.INT4, torch.float16, gpu.device, ((1, 12), (1, 109)), seed=1)
    for field in ("block_tables", "seq_lens"):
        options[field][..., : second.options[field].shape[-1]].copy_(second.options[field])
    first.args[0].copy_(second.args[0])
    for old, new in zip(first.args[1:], second.args[1:], strict=True):
        for a, b in zip(old, new, strict=True):
            a[: len(b)].copy_(b[: len(a)])
    graph.replay()
    close(out, dense(second))


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_two_to_the_31(gpu):
    """Blocks whose codes lie past 2^31 bytes are read where they are."""
    blocks = 2**31 // (16 * 8 * 64) + 64
    batch = CodedBatch(KVFormat.INT4, torch.bfloat16, gpu.device, ((1, 300),),
                       heads=32, kv_heads=8, dim=128)  # fmt: skip
    far = []
    for cache in batch.args[1:]:
        codes = torch.zeros(blocks, 16, 8, 64, dtype=torch.uint8, device="cuda")
        scales = torch.full((blocks, 16, 8), math.nan, device="cuda")
        codes[-len(cache.codes) :], scales[-len(cache.codes) :] = cache.codes, cache.scales
        far.append(type(cache)(codes, scales))
    shift = blocks - len(batch.args[1].codes)
    options = {**batch.options, "block_tables": batch.options["block_tables"] + shift}
    close(quantized_attention(batch.args[0], *far, **options), dense(batch))
