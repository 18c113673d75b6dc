"""Weights widened to 16 bits: exact against the definition, in every layout."""

from __future__ import annotations

import pytest
import torch

from epd_kernels import Format, FormatError, QuantLinear, Scheme, pack, quantize_weight
from epd_kernels.w4_widen import dequantize_wide, w4a16_large


def _weight(n, k, group_size, symmetric):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    return quantize_weight(weight, group_size=group_size or k, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 128, 32), (17, 256, 64), (70, 384, 128), (16, 96, 0)]
)
def test_is_the_definition_rounded_once(n, k, group_size, tiled, symmetric, backend):
    canonical = _weight(n, k, group_size, symmetric)
    packed = pack(canonical, Format.U4)
    packed = (packed.tiled() if tiled else packed).to(torch.device(backend.device))
    # the interpreter cuts fp32 off where it should round it to bf16
    wide = torch.float32 if backend.name == "interpreter" else torch.bfloat16
    for dtype in (torch.float16, wide):
        out = backend.op("w4_widen", "dequantize_wide")(packed, dtype)
        assert torch.equal(out.cpu(), canonical.dequantize().to(dtype))


def test_product(assert_close):
    canonical = _weight(48, 256, 128, False)
    x = torch.randn(33, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2))
    out = w4a16_large(x, pack(canonical, Format.U4), bias=bias)
    assert_close(out, x.double() @ canonical.dequantize().double().t() + bias.double())


def test_refuses_formats_for_eight_bits():
    for target in (Format.SM7, Format.HI4):
        with pytest.raises(FormatError, match="eight-bit activations"):
            dequantize_wide(pack(_weight(4, 128, 128, True), target), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", list(Scheme), ids=lambda s: s.value)
def test_a_layer_gives_the_same_on_both_sides_of_the_crossover(scheme, gpu):
    """511 tokens go through the packed GEMM, 512 through a widened weight."""
    layer = QuantLinear(_weight(256, 1024, 128, True), scheme).to(gpu.device)
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    x = x.to(gpu.device, torch.bfloat16)
    few, many = layer(x[:511]).float(), layer(x).float()
    error = (many[:511] - few).norm() / few.norm()
    # FP8 weights are rounded a second time
    assert float(error) < (0.03 if scheme is Scheme.W4A8_FP8 else 5e-3)
