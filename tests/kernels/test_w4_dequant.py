"""Weights widened to FP8: exact against the definition, and the product against w4_gemm's."""

from __future__ import annotations

import pytest
import torch

from epd_kernels import (
    Format,
    FormatError,
    QuantWeight,
    pack,
    quantize_fp8,
    quantize_weight,
    w4_gemm_ref,
    w4a8_fp8_large,
)
from epd_kernels.w4_dequant import dequantize_fp8_ref

FP8_FORMATS = [Format.U4, Format.SM7]


def _packed(n, k, group_size, target, seed=0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    symmetric = target is Format.SM7
    return pack(quantize_weight(weight, group_size=group_size or k, symmetric=symmetric), target)


@pytest.mark.parametrize("target", FP8_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 128, 32), (17, 256, 64), (63, 256, 128), (16, 96, 0)]
)
def test_kernel_equals_reference_bit_for_bit(n, k, group_size, target, backend):
    packed = _packed(n, k, group_size, target)
    expected, expected_scales = dequantize_fp8_ref(packed)
    run = backend.op("w4_dequant", "dequantize_fp8")
    codes, scales = run(packed.to(torch.device(backend.device)))
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(codes.cpu()[:, :k].float(), expected[:, :k].float())


@pytest.mark.parametrize("target", FP8_FORMATS, ids=lambda f: f.name)
def test_every_code(target, backend):
    """Each code survives to within half a step of three mantissa bits."""
    lowest = -8 if target is Format.U4 else -7
    row = torch.arange(128).remainder(8 - lowest).add(lowest).to(torch.int8)
    packed = pack(QuantWeight(row[None].repeat(2, 1), torch.full((2, 1), 0.25)), target)
    run = backend.op("w4_dequant", "dequantize_fp8")
    codes, scales = run(packed.to(torch.device(backend.device)))
    back = codes.cpu().float() * scales.cpu()[:, None]
    torch.testing.assert_close(back, row.float().repeat(2, 1) * 0.25, rtol=1 / 16, atol=0)


@pytest.mark.parametrize("target", FP8_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("k", [96, 1024])
def test_product_is_near_the_four_bit_one(target, k):
    """Only the second rounding of the weight and bf16 stand between the two."""
    packed = _packed(64, k, 32, target)
    x, x_scales = quantize_fp8(torch.randn(40, k, generator=torch.Generator().manual_seed(1)))
    bias = torch.randn(64, generator=torch.Generator().manual_seed(2))
    options = {"out_dtype": torch.float32, "x_scales": x_scales, "bias": bias}
    expected = w4_gemm_ref(x, packed, **options)
    error = (w4a8_fp8_large(x, packed, **options) - expected).norm() / expected.norm()
    assert 1e-3 < float(error) < 0.03


def test_second_rounding_costs_little():
    """The end error against unquantised operands grows from 0.120 by about a percent."""
    rng = torch.Generator().manual_seed(3)
    weight, x = torch.randn(64, 4096, generator=rng), torch.randn(48, 4096, generator=rng)
    packed = pack(quantize_weight(weight, group_size=128), Format.SM7)
    codes, x_scales = quantize_fp8(x)
    exact = x @ weight.t()
    out = w4a8_fp8_large(codes, packed, out_dtype=torch.float32, x_scales=x_scales)
    assert float((out - exact).norm() / exact.norm()) == pytest.approx(0.1217, rel=0.05)


def test_refusals(backend):
    run = backend.op("w4_dequant", "dequantize_fp8")
    if backend.name != "ref":
        with pytest.raises(FormatError, match="not FP8"):
            run(pack(quantize_weight(torch.ones(2, 128), group_size=128), Format.HI4))
    x, x_scales = quantize_fp8(torch.ones(1, 128))
    odd = pack(quantize_weight(torch.ones(7, 128), group_size=128), Format.SM7)
    with pytest.raises(FormatError, match="found N = 7"):
        w4a8_fp8_large(x, odd, out_dtype=torch.float32, x_scales=x_scales)
