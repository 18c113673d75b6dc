"""w4_gemm against an fp64 product of the dequantised operands, in every scheme and format."""

from __future__ import annotations

import importlib
from functools import partial
from itertools import product

import pytest
import torch

from epd_kernels import FormatError
from epd_kernels.activations import quantize_fp8, quantize_int8
from epd_kernels.launch import GemmConfig
from epd_kernels.packing import Format, QuantWeight, pack, quantize_weight
from epd_kernels.w4_epilogue import Spans, even_pieces
from epd_kernels.w4_gemm import w4_gemm_ref

SCHEMES = {
    "w4a16-u4": (Format.U4, None),
    "w4a8-fp8-u4": (Format.U4, quantize_fp8),
    "w4a8-fp8-sm7": (Format.SM7, quantize_fp8),
    "w4a8-int8-hi4": (Format.HI4, quantize_int8),
}


def _ratio(scheme, backend, out):
    """A GPU's FP8 product keeps about 14 bits of a sum within one group: 2e-3, not 1e-5."""
    short = "fp8" in scheme and backend.name == "gpu" and out.dtype == torch.float32
    return 2e-3 if short else None


def _operands(scheme, m, n, k, group_size, dtype, device, seed=0):
    """(x, x_scales, packed, dequantised x, dequantised w)"""
    rng = torch.Generator().manual_seed(seed)
    target, quantize = SCHEMES[scheme]
    x = torch.randn(m, k, generator=rng).to(dtype)
    scales = None
    if quantize:
        x, scales = quantize(x)
    wide = x.double() if scales is None else x.double() * scales[:, None]
    weight = torch.randn(n, k, generator=rng)
    canonical = quantize_weight(weight, group_size=group_size, symmetric=target is not Format.U4)
    packed = pack(canonical, target).to(torch.device(device))
    dense = canonical.dequantize().double()
    scales = None if scales is None else scales.to(device)
    return x.to(device), scales, packed, wide, dense


SHAPES = [(1, 50, 256), (17, 32, 128), (17, 7, 96), (63, 32, 128)]


@pytest.mark.parametrize("group_size", [32, 128, 0], ids=["g32", "g128", "channel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_dequantised_product(scheme, shape, group_size, backend, assert_close):
    m, n, k = shape
    if group_size and k % group_size:
        pytest.skip("the group does not divide K")
    run = backend.op("w4_gemm", "w4_gemm")
    dtype = torch.float16 if m == 17 else torch.float32
    x, scales, packed, wide, dense = _operands(
        scheme, m, n, k, group_size or k, dtype, backend.device
    )
    bias = torch.randn(n, generator=torch.Generator().manual_seed(9)).to(backend.device)
    out = run(x, packed, out_dtype=dtype, x_scales=scales, bias=bias)
    assert out.dtype == dtype
    expected = wide @ dense.t() + bias.double().cpu()
    assert_close(out, expected, ratio=_ratio(scheme, backend, out))


@pytest.mark.parametrize("group_size", [64, 128, 0])
@pytest.mark.parametrize("scheme", ["w4a8-fp8-sm7", "w4a8-int8-hi4", "w4a16-u4"])
@pytest.mark.parametrize("k", [512, 384])
def test_two_steps_per_trip_give_the_same_product(k, scheme, group_size, backend):
    """Where two divides the steps, and where it does not and one is taken."""
    if backend.name == "ref":
        pytest.skip("the reference has no loop")
    run = backend.op("w4_gemm", "w4_gemm")
    x, scales, packed, _, _ = _operands(
        scheme, 5, 70, k, group_size or k, torch.float32, backend.device
    )
    outs = [
        run(
            x, packed.tiled(), out_dtype=torch.float32, x_scales=scales,
            config=GemmConfig(64, 16, splits, 4, 3, False, False, unroll),
        )
        for splits, unroll in ((1, 1), (1, 2), (3, 2))
    ]  # fmt: skip
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(outs[2], outs[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("group_size", [64, 128, 0])
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("unroll", [1, 2])
def test_tiles_may_begin_anywhere_in_their_span(unroll, splits, group_size, backend):
    """Exact integer sums: the order of K cannot be seen."""
    if backend.name == "ref":
        pytest.skip("the reference has no loop")
    run = backend.op("w4_gemm", "w4_gemm")
    rng = torch.Generator().manual_seed(8)
    codes = torch.randint(-8, 8, (300, 640), generator=rng, dtype=torch.int8)
    x = torch.randint(-127, 128, (5, 640), generator=rng, dtype=torch.int8)
    groups = 640 // (group_size or 640)
    packed = pack(QuantWeight(codes, torch.ones(300, groups)), Format.HI4).tiled()
    out = run(
        x.to(backend.device), packed.to(torch.device(backend.device)), out_dtype=torch.float32,
        config=GemmConfig(64, 16, splits, 4, 3, backend.name == "gpu", unroll=unroll, turned=True),
    )  # fmt: skip
    assert torch.equal(out.cpu().double(), x.double() @ codes.double().t())


@pytest.mark.parametrize("scheme", ["w4a8-fp8-sm7", "w4a8-int8-hi4"])
def test_tiled_weights_give_the_same_product(scheme, backend):
    run = backend.op("w4_gemm", "w4_gemm")
    x, scales, packed, _, _ = _operands(scheme, 5, 70, 384, 128, torch.float32, backend.device)
    options = {"out_dtype": torch.float32, "x_scales": scales}
    assert torch.equal(run(x, packed, **options), run(x, packed.tiled(), **options))


@pytest.mark.parametrize("scheme", ["w4a16-u4", "w4a8-fp8-u4"])
def test_symmetric_weights_in_u4(scheme, backend, assert_close):
    """Zeros that are all 8 vanish where operands are centred, and nowhere else."""
    run = backend.op("w4_gemm", "w4_gemm")
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(5)).to(backend.device)
    codes, scales = quantize_fp8(x) if "fp8" in scheme else (x, None)
    wide = codes.double() if scales is None else codes.double() * scales[:, None]
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(6))
    for group_size in (64, 256):
        canonical = quantize_weight(weight, group_size=group_size)
        packed = pack(canonical, Format.U4).to(torch.device(backend.device))
        out = run(codes, packed, out_dtype=torch.float32, x_scales=scales)
        expected = wide.cpu() @ canonical.dequantize().double().t()
        assert_close(out, expected, ratio=_ratio(scheme, backend, out))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_splits_of_k(scheme, splits, backend, assert_close):
    """Any number of spans, even of unequal length, gives the product; two runs agree exactly."""
    run = backend.op("w4_gemm", "w4_gemm")
    options = {} if backend.name == "ref" else {"config": GemmConfig(32, 16, splits, 4, 1)}
    x, scales, packed, wide, dense = _operands(
        scheme, 5, 48, 1280, 64, torch.float32, backend.device
    )
    outs = [run(x, packed, out_dtype=torch.float32, x_scales=scales, **options) for _ in "12"]
    assert torch.equal(*outs)
    assert_close(outs[0], wide @ dense.t(), ratio=_ratio(scheme, backend, outs[0]))


@pytest.mark.parametrize("scheme", ["w4a8-fp8-sm7", "w4a8-int8-hi4"])
@pytest.mark.parametrize("group_size", [128, 0])
@pytest.mark.parametrize("unroll", [1, 2])
def test_only_the_uneven_rest_is_cut(unroll, group_size, scheme, backend, assert_close):
    """Six blocks on the four multiprocessors of a CPU: two are cut, and twice in half."""
    if backend.name == "ref":
        pytest.skip("the reference has no launch")
    run = backend.op("w4_gemm", "w4_gemm")
    x, scales, packed, wide, dense = _operands(
        scheme, 17, 150, 1280, group_size or 1280, torch.float32, backend.device
    )
    config = GemmConfig(64, 16, 3, 4, 3, backend.name == "gpu", unroll=unroll, cut=True)
    run = partial(run, x, packed.tiled(), out_dtype=torch.float32, x_scales=scales, config=config)
    outs = [run() for _ in range(3)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert_close(outs[0], wide @ dense.t(), ratio=_ratio(scheme, backend, outs[0]))


@pytest.mark.parametrize(
    ("blocks", "sms", "most", "pieces"),
    [
        (2, 4, 4, 2),
        (40, 132, 4, 3),
        (80, 132, 4, 3),
        (92, 132, 4, 4),
        (131, 132, 4, 1),
        (1, 4, 3, 3),
    ],
)
def test_pieces_end_together(blocks, sms, most, pieces):
    """The busiest multiprocessor of any other count has more to do, or as much in more pieces."""
    assert even_pieces(blocks, sms, most=most) == pieces


def test_every_block_and_span_has_one_program():
    """Whole blocks first, then the first span of each other block, the second, and so on."""
    out = torch.empty(17, 150)
    spans = Spans.of(GemmConfig(64, 16, 3, 4, 3, cut=True), 17, 150, torch.float32, out)
    assert (spans.programs, spans.whole, spans.count) == (4 + 2 * 2, 4, 2)
    assert spans.partial.numel() == 2 * 2 * 64 * 16
    even = Spans.of(GemmConfig(64, 16, 3, 4, 3, cut=True), 17, 256, torch.float32, out)
    assert (even.programs, even.count) == (8, 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("splits", [1, 2])
def test_a_residual_is_added_after_the_rounding(scheme, splits, backend):
    """As a separate addition would, bit for bit, and from rows that lie apart."""
    run = backend.op("w4_gemm", "w4_gemm")
    options = {} if backend.name == "ref" else {"config": GemmConfig(32, 16, splits, 4, 1)}
    x, scales, packed, _, _ = _operands(scheme, 17, 70, 256, 128, torch.float32, backend.device)
    residual = torch.randn(34, 70, generator=torch.Generator().manual_seed(2)).half()[::2]
    residual = residual.to(backend.device)
    run = partial(run, x, packed, out_dtype=torch.float16, x_scales=scales, **options)
    assert torch.equal(run(residual=residual), run() + residual)


def test_refuses_a_residual_of_another_shape_or_dtype(backend):
    if backend.name == "ref":
        pytest.skip("torch would broadcast it")
    x, _, packed, _, _ = _operands("w4a16-u4", 5, 70, 256, 128, torch.float32, backend.device)
    run = partial(backend.op("w4_gemm", "w4_gemm"), x, packed, out_dtype=torch.float32)
    for residual in (torch.zeros(5, 64), torch.zeros(5, 70).half(), torch.zeros(70, 5).t()):
        with pytest.raises(FormatError, match=r"residual must be torch\.float32 \[5, 70\]"):
            run(residual=residual.to(backend.device))


def test_more_blocks_than_counters(backend, monkeypatch):
    """A launch that asks to split K still runs, on one span, where its blocks are too many."""
    if backend.name == "ref":
        pytest.skip("the reference has no launch")
    epilogue = importlib.import_module("epd_kernels.w4_epilogue")
    x, scales, packed, _, _ = _operands(
        "w4a8-int8-hi4", 40, 70, 1024, 128, torch.float32, backend.device
    )
    run = backend.op("w4_gemm", "w4_gemm")
    run = partial(run, x, packed, out_dtype=torch.float32, x_scales=scales)
    expected = run(config=GemmConfig(32, 16, 1, 4, 1))
    monkeypatch.setattr(epilogue, "_MOST_BLOCKS", 8)
    assert torch.equal(run(config=GemmConfig(32, 16, 2, 4, 1)), expected)


def test_int8_products_are_exact(backend):
    """Integer operands with unit scales: the sum is an integer, and must be that one."""
    rng = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (33, 256), generator=rng, dtype=torch.int8)
    x = torch.randint(-127, 128, (9, 256), generator=rng, dtype=torch.int8)
    packed = pack(QuantWeight(codes, torch.ones(33, 2)), Format.HI4)
    out = backend.op("w4_gemm", "w4_gemm")(
        x.to(backend.device), packed.to(torch.device(backend.device)), out_dtype=torch.float32
    )
    assert torch.equal(out.cpu().double(), x.double() @ codes.double().t())


@pytest.mark.parametrize("target", [Format.U4, Format.SM7], ids=lambda f: f.name)
def test_every_code_meets_fp8(target, backend):
    """Identity activations read the decoded weight back, code by code."""
    lowest = -8 if target is Format.U4 else -7
    codes = torch.arange(128 * 16).remainder(8 - lowest).add(lowest).view(16, 128).to(torch.int8)
    packed = pack(QuantWeight(codes, torch.ones(16, 1)), target)
    x = torch.eye(128).to(torch.float8_e4m3fn).to(backend.device)
    out = backend.op("w4_gemm", "w4_gemm")(
        x, packed.to(torch.device(backend.device)), out_dtype=torch.float32
    )
    assert torch.equal(out.cpu().t(), codes.float())


def test_small_products_survive_a_large_one(backend, assert_close):
    """One huge group beside many small ones: each group is promoted to fp32 on its own."""
    codes = torch.ones(16, 4096, dtype=torch.int8)
    scales = torch.full((16, 32), 2.0**-12)
    scales[:, 0] = 1.0
    packed = pack(QuantWeight(codes, scales), Format.SM7).to(torch.device(backend.device))
    x = torch.ones(1, 4096).to(torch.float8_e4m3fn).to(backend.device)
    out = backend.op("w4_gemm", "w4_gemm")(x, packed, out_dtype=torch.float32)
    assert_close(out, torch.full((1, 16), 128 + 31 * 128 * 2.0**-12))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens_and_views(scheme, backend, assert_close):
    run = backend.op("w4_gemm", "w4_gemm")
    x, scales, packed, wide, dense = _operands(
        scheme, 6, 20, 256, 128, torch.float32, backend.device
    )
    none = None if scales is None else scales[:0]
    empty = run(x[:0], packed, out_dtype=torch.float32, x_scales=none)
    assert empty.shape == (0, 20)
    strided = None if scales is None else scales[::2].contiguous()
    out = run(x[::2], packed, out_dtype=torch.float32, x_scales=strided)
    assert_close(out, wide[::2] @ dense.t(), ratio=_ratio(scheme, backend, out))
    column_major = x.t().contiguous().t()
    out = run(column_major, packed, out_dtype=torch.float32, x_scales=scales)
    assert_close(out, wide @ dense.t(), ratio=_ratio(scheme, backend, out))


def test_refuses_what_it_cannot_multiply(backend):
    run = backend.op("w4_gemm", "w4_gemm")
    weight = quantize_weight(torch.ones(4, 128), group_size=128)
    x = torch.ones(1, 128, device=backend.device)
    for target in (Format.SM7, Format.HI4):
        with pytest.raises(FormatError, match=r"cannot meet torch\.float32"):
            run(x, pack(weight, target), out_dtype=torch.float32)
    with pytest.raises(FormatError, match="64 features, the weight 128"):
        run(x[:, :64], pack(weight, Format.U4), out_dtype=torch.float32)


BANDS = {"w4a8-fp8-sm7": 0.120, "w4a8-int8-hi4": 0.117}


@pytest.mark.parametrize("scheme", BANDS)
def test_end_error_is_the_known_one(scheme):
    """Relative output error of Gaussian operands at K = 4096, group 128."""
    x, scales, packed, _, _ = _operands(scheme, 32, 64, 4096, 128, torch.float32, "cpu")
    rng = torch.Generator().manual_seed(0)
    exact = torch.randn(32, 4096, generator=rng) @ torch.randn(64, 4096, generator=rng).t()
    out = w4_gemm_ref(x, packed, out_dtype=torch.float32, x_scales=scales)
    assert float((out - exact).norm() / exact.norm()) == pytest.approx(BANDS[scheme], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ptx_equals_its_portable_twin(scheme, gpu):
    """Every pair of codes through both decodes, bit for bit."""
    dtype = torch.bfloat16 if "a16" in scheme else torch.float32
    x, scales, packed, _, _ = _operands(scheme, 64, 256, 4096, 128, dtype, "cpu")
    move = torch.device(gpu.device)
    everything = torch.arange(256, dtype=torch.uint8).repeat(8)
    packed.data[0, :] = everything[: packed.data.shape[1]]
    run, packed = gpu.op("w4_gemm", "w4_gemm"), packed.to(move)
    outs = [
        run(
            x.to(move), packed, out_dtype=torch.float32,
            x_scales=None if scales is None else scales.to(move),
            config=GemmConfig(128, 64, 1, 4, 3, use_ptx),
        )
        for use_ptx in (False, True)
    ]  # fmt: skip
    assert torch.equal(*outs)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3])
def test_early_launches_change_nothing(splits, gpu):
    """Each product reads what the one before it wrote; 100 runs agree bit for bit."""
    x, scales, packed, _, _ = _operands("w4a8-fp8-sm7", 16, 4096, 4096, 128, torch.float32, "cpu")
    move = torch.device(gpu.device)
    codes, tiled = x.to(move), packed.to(move).tiled()
    run, quantize = gpu.op("w4_gemm", "w4_gemm"), gpu.op("activations", "quantize_fp8")

    def chain(early):
        config, given, told = GemmConfig(64, 16, splits, 4, 4, True, early), codes, scales.to(move)
        for _ in range(4):
            out = run(given, tiled, out_dtype=torch.bfloat16, x_scales=told, config=config)
            given, told = quantize(out)
        return out

    expected = chain(False)
    for _ in range(100):
        assert torch.equal(chain(True), expected)


MODEL_SHAPES = [
    (m, n, k)
    for m, (n, k) in product(
        (1, 8, 16, 33, 64, 128, 1000), ((4096, 4096), (2112, 4096), (512, 14336), (3584, 18944))
    )
]


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
def test_model_shapes(scheme, shape, gpu, assert_close):
    x, scales, packed, wide, dense = _operands(scheme, *shape, 128, torch.bfloat16, "cpu")
    move = torch.device(gpu.device)
    out = gpu.op("w4_gemm", "w4_gemm")(
        x.to(move), packed.to(move), out_dtype=torch.bfloat16,
        x_scales=None if scales is None else scales.to(move),
    )  # fmt: skip
    assert_close(out, (wide.to(move) @ dense.to(move).t()))
