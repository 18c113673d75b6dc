"""Group scales folded into FP8 operands: the numbers of the widened weight, without writing it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from epd_kernels import FormatError
from epd_kernels.activations import quantize_fp8
from epd_kernels.launch import GemmConfig
from epd_kernels.packing import Format, QuantWeight, pack, quantize_weight
from epd_kernels.w4_dequant import dequantize_fp8_ref, w4a8_fp8_large
from epd_kernels.w4_folded import fold_scales, w4a8_fp8_folded
from epd_kernels.w4_gemm import w4_gemm_ref


def _operands(m, n, k, device="cpu", seed=0):
    """(e4m3 x, its scales, a weight in SM7)"""
    rng = torch.Generator().manual_seed(seed)
    x, scales = quantize_fp8(torch.randn(m, k, generator=rng))
    weight = torch.randn(n, k, generator=rng) * torch.rand(n, 1, generator=rng)
    packed = pack(quantize_weight(weight, group_size=128), Format.SM7)
    return x.to(device), scales.to(device), packed.to(torch.device(device))


def _expected(x, scales, packed):
    """fp64, over the weight as the second rounding leaves it."""
    codes, rows = dequantize_fp8_ref(packed.to(torch.device("cpu")))
    wide = x.cpu().double() * scales.cpu().double()[:, None]
    return wide @ (codes.double() * rows.double()[:, None]).t()


def _ratio(backend):
    """A GPU keeps about 14 bits of the sum of a row."""
    return 4e-3 if backend.name == "gpu" else None


@pytest.mark.parametrize("tiled", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("shape", [(1, 64, 256), (17, 70, 128), (40, 7, 1280)], ids=str)
def test_equals_the_product_with_the_widened_weight(shape, tiled, backend, assert_close):
    x, scales, packed = _operands(*shape, backend.device)
    packed = packed.tiled() if tiled else packed
    bias = torch.randn(shape[1], generator=torch.Generator().manual_seed(1)).to(backend.device)
    out = backend.op("w4_folded", "w4a8_fp8_folded")(
        x, packed, out_dtype=torch.float32, x_scales=scales, bias=bias,
        folded=fold_scales(packed),
    )  # fmt: skip
    expected = _expected(x, scales, packed) + bias.double().cpu()
    assert_close(out, expected, ratio=_ratio(backend))


def test_every_code_under_every_ratio_is_the_widened_one(backend):
    """Identity activations read the operand back: bit for bit what widening writes."""
    exponents = torch.linspace(-22, 5.9, 500)
    scales = torch.exp2(exponents)[:, None]
    codes = torch.arange(128).remainder(15).sub(7).to(torch.int8).repeat(500, 1)
    packed = pack(QuantWeight(codes, scales), Format.SM7).to(torch.device(backend.device))
    ones = torch.ones(500, device=backend.device)
    expected, _ = dequantize_fp8_ref(packed.to(torch.device("cpu")), ones.cpu())
    out = backend.op("w4_folded", "w4a8_fp8_folded")(
        torch.eye(128).to(torch.float8_e4m3fn).to(backend.device), packed,
        out_dtype=torch.float32, x_scales=ones[:128], folded=fold_scales(packed, ones),
    )  # fmt: skip
    assert torch.equal(out.cpu().t(), expected.float())


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("unroll", [1, 2])
def test_spans_and_shared_trips(splits, unroll, backend, assert_close):
    options = {}
    if backend.name != "ref":
        options["config"] = GemmConfig(64, 16, splits, 4, 3, backend.name == "gpu", unroll=unroll)
    x, scales, packed = _operands(5, 70, 1280, backend.device)
    run = backend.op("w4_folded", "w4a8_fp8_folded")
    folded = fold_scales(packed)
    outs = [
        run(x, packed, out_dtype=torch.float32, x_scales=scales, folded=folded, **options)
        for _ in "12"
    ]
    assert torch.equal(*outs)
    assert_close(outs[0], _expected(x, scales, packed), ratio=_ratio(backend))


@pytest.mark.parametrize("shape", [(5, 330, 1280), (33, 330, 896), (40, 200, 384)], ids=str)
@pytest.mark.parametrize("unroll", [1, 2])
def test_only_the_uneven_rest_is_cut(shape, unroll, backend, assert_close):
    """6, 18 and 12 blocks on the four multiprocessors of a CPU: two, two and none are cut."""
    if backend.name == "ref":
        pytest.skip("the reference has no launch")
    x, scales, packed = _operands(*shape, backend.device)
    config = GemmConfig(64, 16, 4, 4, 3, backend.name == "gpu", unroll=unroll, cut=True)
    run = partial(
        backend.op("w4_folded", "w4a8_fp8_folded"), x, packed.tiled(), out_dtype=torch.float32,
        x_scales=scales, folded=fold_scales(packed), config=config,
    )  # fmt: skip
    outs = [run() for _ in range(3)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert_close(outs[0], _expected(x, scales, packed), ratio=_ratio(backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_residual_is_added_after_the_rounding(dtype, backend):
    if dtype not in backend.dtypes:
        pytest.skip("the interpreter has no bf16 products")
    x, scales, packed = _operands(17, 70, 256, backend.device)
    residual = torch.randn(34, 70, generator=torch.Generator().manual_seed(2)).to(dtype)[::2]
    options = {"out_dtype": dtype, "x_scales": scales, "folded": fold_scales(packed)}
    run = backend.op("w4_folded", "w4a8_fp8_folded")
    fused = run(x, packed, residual=residual.to(backend.device), **options)
    assert torch.equal(fused, run(x, packed, **options) + residual.to(backend.device))


def test_no_tokens(backend):
    x, scales, packed = _operands(1, 64, 256, backend.device)
    run = backend.op("w4_folded", "w4a8_fp8_folded")
    options = {"out_dtype": torch.float16, "folded": fold_scales(packed)}
    assert run(x[:0], packed, x_scales=scales[:0], **options).shape == (0, 64)


def test_agrees_with_the_product_over_a_widened_weight(assert_close):
    """The two paths a growing batch goes through multiply the same numbers."""
    x, scales, packed = _operands(17, 64, 256)
    out = w4a8_fp8_folded(x, packed, out_dtype=torch.bfloat16, x_scales=scales)
    large = w4a8_fp8_large(x, packed, out_dtype=torch.bfloat16, x_scales=scales)
    assert_close(out, large)


def test_the_second_rounding_costs_a_hundredth_of_the_first():
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(32, 4096, generator=rng), torch.randn(64, 4096, generator=rng)
    packed = pack(quantize_weight(weight, group_size=128), Format.SM7)
    codes, scales = quantize_fp8(x)
    options = {"out_dtype": torch.float32, "x_scales": scales}
    exact = x @ weight.t()
    errors = [
        float((run(codes, packed, **options) - exact).norm() / exact.norm())
        for run in (w4_gemm_ref, w4a8_fp8_folded)
    ]
    assert errors[1] == pytest.approx(0.122, rel=0.05)
    assert errors[1] < 1.03 * errors[0]


def test_refuses_what_does_not_fold():
    weight = torch.ones(4, 256)
    for group_size, target in ((64, Format.SM7), (256, Format.SM7), (128, Format.U4)):
        packed = pack(quantize_weight(weight, group_size=group_size), target)
        with pytest.raises(FormatError, match="fold into SM7 weights with groups of 128"):
            fold_scales(packed)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(64, 64, 4), (128, 64, 4), (128, 128, 8), (64, 128, 4)], ids=str)
@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("cut", [False, True])
def test_many_products_at_once_agree(cut, unroll, tile, gpu, assert_close):
    """On a busy multiprocessor a product lasts; no register it reads may be written meanwhile."""
    x, scales, packed = _operands(128, 22016, 2048, gpu.device)
    packed = packed.tiled()
    rows, tokens, warps = tile
    config = GemmConfig(rows, tokens, 4 if cut else 1, warps, 3, early=True, unroll=unroll, cut=cut)
    run = partial(
        gpu.op("w4_folded", "w4a8_fp8_folded"), x, packed, out_dtype=torch.bfloat16,
        x_scales=scales, folded=fold_scales(packed), config=config,
    )  # fmt: skip
    outs = [run() for _ in range(30)]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert_close(outs[0], _expected(x, scales, packed))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [33, 64, 128, 500])
@pytest.mark.parametrize("shape", [(4096, 4096), (2112, 4096), (512, 14336)], ids=str)
def test_model_shapes(m, shape, gpu, assert_close):
    x, scales, packed = _operands(m, *shape, gpu.device)
    packed = packed.tiled()
    out = gpu.op("w4_folded", "w4a8_fp8_folded")(
        x, packed, out_dtype=torch.bfloat16, x_scales=scales, folded=fold_scales(packed)
    )
    assert_close(out, _expected(x, scales, packed))
