"""FP8 weights with one scale per row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from epd_kernels import FormatError, Fp8Linear, Fp8Weight, quantize_weight_fp8


def test_a_weight_is_rounded_per_row() -> None:
    weight = (
        torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        * torch.arange(1.0, 9)[:, None]
    )
    rounded = quantize_weight_fp8(weight)
    torch.testing.assert_close(rounded.scales, weight.abs().amax(1) / 448)
    error = (rounded.dequantize() - weight).abs()
    # three mantissa bits: half a step is a sixteenth; below 2^-6 of the scale steps are 2^-9
    assert bool((error <= weight.abs() / 16 + rounded.scales[:, None] * 2**-10).all())


def test_a_layer_is_the_product_of_what_was_rounded() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = quantize_weight_fp8(torch.randn(24, 40, generator=generator))
    bias = torch.randn(24, generator=generator)
    x = torch.randn(3, 5, 40, generator=generator)
    step = x.abs().amax(-1, keepdim=True) / 448
    seen = (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).double() * step
    wanted = seen @ weight.dequantize().double().t() + bias
    layer = Fp8Linear(weight, bias=bias)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert layer.resident_bytes() == 24 * 40 + 24 * 4 + 24 * 4
    layer.to(torch.bfloat16)
    assert layer.weight.codes.dtype == torch.float8_e4m3fn
    # rounding x to bf16 first moves some of its FP8 codes by one
    narrow = layer(x.bfloat16()).double()
    assert float((narrow - wanted).norm() / wanted.norm()) < 0.03


def test_rows_of_zeros_give_the_bias() -> None:
    layer = Fp8Linear(quantize_weight_fp8(torch.zeros(4, 16)), bias=torch.arange(4.0))
    assert torch.equal(layer(torch.zeros(2, 16)), torch.arange(4.0).expand(2, 4))


@pytest.mark.parametrize(
    ("codes", "scales", "named"),
    [
        (torch.zeros(2, 4), torch.ones(2), "e4m3"),
        (torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.ones(3), "one scale per row"),
        (torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.tensor([1.0, float("nan")]), "finite"),
        (torch.full((2, 4), float("nan")).to(torch.float8_e4m3fn), torch.ones(2), "NaN"),
    ],
)
def test_what_is_no_fp8_weight_is_refused(
    codes: torch.Tensor, scales: torch.Tensor, named: str
) -> None:
    with pytest.raises(FormatError, match=named):
        Fp8Weight(codes, scales)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu(gpu: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = quantize_weight_fp8(torch.randn(64, 128, generator=generator))
    x = torch.randn(17, 128, generator=generator).bfloat16()
    wanted = Fp8Linear(weight)(x).float()
    got = Fp8Linear(weight).to(gpu.device)(x.to(gpu.device)).float().cpu()
    assert float((got - wanted).norm() / wanted.norm()) < 8e-3
