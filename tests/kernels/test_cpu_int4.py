"""Torch's four-bit product on a CPU, against the dequantised numbers, and when it is taken."""

from __future__ import annotations

import pytest
import torch

from epd_kernels import QuantLinear, Scheme
from epd_kernels.activations import quantize_fp8, quantize_int8
from epd_kernels.cpu_int4 import CpuInt4, suits_cpu_int4
from epd_kernels.packing import pack, quantize_weight

QUANTIZE = {Scheme.W4A8_FP8: quantize_fp8, Scheme.W4A8_INT8: quantize_int8}


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(16, 128), (48, 256), (512, 384)])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_equals_the_definition(tokens, rows, width, symmetric, group_size):
    weight = quantize_weight(_randn(rows, width), group_size=group_size, symmetric=symmetric)
    x = _randn(tokens, width, seed=1).bfloat16()
    wanted = x.double() @ weight.dequantize().double().t()
    got = CpuInt4(weight)(x)
    assert got.dtype == torch.bfloat16
    assert float((got.double() - wanted).norm() / wanted.norm()) < 8e-3


def test_every_code_and_zero_is_told_apart():
    """One input at a time reads the weight back, up to the rounding of its scale."""
    codes = torch.arange(128, dtype=torch.int8).remainder(16) - 8
    weight = quantize_weight(_randn(16, 128), group_size=32, symmetric=False)
    weight.codes[:] = codes
    got = torch.cat([CpuInt4(weight)(rows) for rows in torch.eye(128).split(8)])
    wanted = weight.dequantize().t()
    step = weight.scales.repeat_interleave(32, 1).t()
    assert float(((got.float() - wanted).abs() / step).max()) < 0.25


def test_where_it_is_taken(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer = QuantLinear(quantize_weight(_randn(48, 256), group_size=64), Scheme.W4A16)
    weight = layer.weight
    assert [suits_cpu_int4(weight, n, torch.bfloat16) for n in (0, 1, 8, 9)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert not suits_cpu_int4(weight, 1, torch.float32)
    for rows, group_size in ((40, 64), (48, 256)):
        other = quantize_weight(_randn(rows, 256), group_size=group_size)
        assert not suits_cpu_int4(pack(other, weight.format), 1, torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not suits_cpu_int4(weight, 1, torch.bfloat16)


@pytest.mark.parametrize("scheme", list(Scheme), ids=lambda s: s.value)
@pytest.mark.parametrize("tokens", [1, 8, 9])
def test_layers_give_the_same_with_it(scheme, tokens, monkeypatch):
    """Both ways of a bf16 layer lie within bf16's rounding of the definition."""
    weight = quantize_weight(_randn(48, 256), group_size=64)
    bias = _randn(48, seed=3).bfloat16()
    x = _randn(tokens, 256, seed=2).bfloat16()
    wide = x.double()
    if scheme in QUANTIZE:
        codes, scales = QUANTIZE[scheme](x)
        wide = codes.double() * scales[:, None]
    wanted = wide @ weight.dequantize().double().t() + bias.double()
    for capability in ("AVX512", "DEFAULT"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        layer = QuantLinear(weight, scheme, bias=bias)
        for _ in "12":
            got = layer(x)
            assert got.dtype == torch.bfloat16
            assert float((got.double() - wanted).norm() / wanted.norm()) < 8e-3
        taken = capability == "AVX512" and tokens <= 8
        assert (layer._few is not None) == taken
        layer.to("cpu")
        assert layer._few is None
