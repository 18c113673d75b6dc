"""QuantLinear against an ordinary linear layer over the same, dequantised, numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from epd_kernels import FormatError, QuantLinear, Scheme, add_rms_norm, add_rms_norm_quant
from epd_kernels.activations import quantize_fp8, quantize_int8
from epd_kernels.packing import Format, quantize_weight

QUANTIZE = {Scheme.W4A8_FP8: quantize_fp8, Scheme.W4A8_INT8: quantize_int8}


def _weight(rows=40, width=256, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def _expected(x, weight, scheme, bias):
    """fp64 linear of the dequantised operands."""
    wide = x.double()
    if scheme in QUANTIZE:
        codes, scales = QUANTIZE[scheme](x)
        wide = codes.double() * scales[:, None]
    return functional.linear(wide, weight.dequantize().double(), bias.double())


@pytest.mark.parametrize("group_size", [64, 256], ids=["g64", "channel"])
@pytest.mark.parametrize("scheme", list(Scheme), ids=lambda s: s.value)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_equals_linear(tokens, scheme, group_size, assert_close):
    weight = quantize_weight(_weight(), group_size=group_size)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1))
    x = _weight(tokens, 256, seed=2)
    layer = QuantLinear(weight, scheme, bias=bias)
    for _ in "12":
        assert_close(layer(x), _expected(x, weight, scheme, bias))


def test_leading_dimensions_and_dtype(assert_close):
    weight = quantize_weight(_weight(), group_size=128)
    layer = QuantLinear(weight, Scheme.W4A16)
    x = _weight(6, 256, seed=2).bfloat16()
    out = layer(x.view(2, 3, 256))
    assert out.shape == (2, 3, 40) and out.dtype == torch.bfloat16
    assert_close(out.flatten(0, 1), x.double() @ weight.dequantize().double().t())


def test_format_follows_codes():
    """The cheapest FP8 format that can hold the weight."""
    symmetric = quantize_weight(_weight(), group_size=128)
    asymmetric = quantize_weight(_weight(), group_size=128, symmetric=False)
    assert QuantLinear(symmetric, Scheme.W4A8_FP8).weight.format is Format.SM7
    assert QuantLinear(asymmetric, Scheme.W4A8_FP8).weight.format is Format.U4
    symmetric.codes[3, 7] = -8
    assert QuantLinear(symmetric, Scheme.W4A8_FP8).weight.format is Format.U4
    with pytest.raises(FormatError, match="holds no zeros"):
        QuantLinear(asymmetric, Scheme.W4A8_INT8)


def test_casting_a_model_keeps_scales(assert_close):
    """`model.bfloat16()` turns the bias, and must not touch scales."""
    weight = quantize_weight(_weight(), group_size=128)
    layer = QuantLinear(weight, Scheme.W4A16, bias=torch.ones(40))
    before = layer.weight.scales.clone()
    model = torch.nn.Sequential(layer).bfloat16()
    assert torch.equal(layer.weight.scales, before) and layer.bias.dtype == torch.bfloat16
    x = _weight(3, 256, seed=2).bfloat16()
    assert_close(model(x), _expected(x, weight, Scheme.W4A16, torch.ones(40)))


@pytest.mark.parametrize("scheme", [Scheme.W4A8_FP8, Scheme.W4A8_INT8], ids=lambda s: s.value)
def test_fused_norm_feeds_the_product(scheme):
    """Activations quantised by the norm give the very result of the unfused layer."""
    layer = QuantLinear(quantize_weight(_weight(), group_size=128), scheme)
    x, residual, weight = _weight(17), _weight(17, seed=3), torch.ones(256)
    normed, _ = add_rms_norm(x, residual, weight, 1e-5)
    codes, scales, _ = add_rms_norm_quant(x, residual, weight, 1e-5, dtype=layer.activation_dtype)
    assert torch.equal(layer.multiply(codes, scales, dtype=x.dtype), layer(normed))


@pytest.mark.parametrize("scheme", list(Scheme), ids=lambda s: s.value)
def test_multiply_adds_a_residual_after_the_rounding(scheme):
    layer = QuantLinear(quantize_weight(_weight(), group_size=128), scheme)
    x, residual = _weight(17, seed=4).bfloat16(), _weight(17, 40, seed=5).bfloat16()
    codes, scales = QUANTIZE[scheme](x) if scheme in QUANTIZE else (x, None)
    plain = layer.multiply(codes, scales, dtype=torch.bfloat16)
    fused = layer.multiply(codes, scales, dtype=torch.bfloat16, residual=residual)
    assert torch.equal(fused, plain + residual)


@pytest.mark.parametrize(
    ("tokens", "rows", "folded"),
    [(64, 65536, False), (65, 65536, True), (128, 8192, False), (128, 16384, True),
     (511, 8192, True), (512, 8191, False), (512, 8192, True), (640, 8192, True),
     (641, 65536, False)],
)  # fmt: skip
def test_where_scales_are_folded(tokens, rows, folded):
    """Between 65 and 640 tokens, from 2^21 outputs on, and 2^22 where widening is the rival."""
    layer = QuantLinear(quantize_weight(_weight(), group_size=128), Scheme.W4A8_FP8)
    layer.out_features = rows
    assert layer._is_folded(tokens) is folded


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 65, 200, 600])
@pytest.mark.parametrize("scheme", list(Scheme), ids=lambda s: s.value)
def test_every_batch_size_gives_the_same_rows(scheme, tokens, gpu, assert_close):
    """Whatever kernel a batch takes, its first rows are those of a single token's, nearly."""
    layer = QuantLinear(quantize_weight(_weight(512, 1024), group_size=128), scheme)
    layer = layer.to(gpu.device)
    x = _weight(tokens, 1024, seed=2).bfloat16().to(gpu.device)
    # the second rounding of a folded or widened weight
    assert_close(layer(x)[:1], layer(x[:1]).float(), ratio=0.04)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", list(Scheme), ids=lambda s: s.value)
def test_gpu_equals_cpu(scheme, gpu, assert_close):
    layer = QuantLinear(quantize_weight(_weight(512, 1024), group_size=128), scheme)
    x = _weight(33, 1024, seed=2).bfloat16()
    expected = layer(x)
    assert_close(layer.to(gpu.device)(x.to(gpu.device)), expected)
