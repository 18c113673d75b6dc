"""Fused quantising ops equal the separate ones, code for code."""

from __future__ import annotations

import pytest
import torch

EIGHT = {torch.float8_e4m3fn: "quantize_fp8", torch.int8: "quantize_int8"}


def _randn(*shape, dtype, device, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng).to(device, dtype)


def _nearly(actual, expected):
    """The same but for the order in which a row was summed: a last bit here, a step there."""
    (codes, scales), (wanted, wanted_scales) = actual, expected
    assert codes.dtype == wanted.dtype
    torch.testing.assert_close(scales, wanted_scales, rtol=1e-2, atol=0)
    off = codes.view(torch.uint8) != wanted.view(torch.uint8)
    assert int(off.sum()) <= 0.01 * off.numel()
    values, meant = codes.float(), wanted.float()
    assert torch.all((values - meant).abs() <= 1 + meant.abs() / 8)


def _same(actual, expected):
    (codes, scales), (wanted, wanted_scales) = actual, expected
    assert codes.dtype == wanted.dtype and torch.equal(scales, wanted_scales)
    assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("eight", EIGHT, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 100), (17, 256), (63, 48)], ids=str)
def test_norm_then_quantise(shape, eight, backend):
    norm, quantize = backend.op("norm", "add_rms_norm"), backend.op("activations", EIGHT[eight])
    run = backend.op("fused_quant", "add_rms_norm_quant")
    for dtype in backend.dtypes:
        x = _randn(*shape, dtype=dtype, device=backend.device)
        residual = _randn(*shape, dtype=dtype, device=backend.device, seed=1)
        weight = _randn(shape[1], dtype=dtype, device=backend.device, seed=2)
        normed, total = norm(x, residual, weight, 1e-5)
        *actual, new_residual = run(x, residual, weight, 1e-5, dtype=eight)
        assert torch.equal(new_residual, total)
        (_nearly if backend.name == "gpu" else _same)(actual, quantize(normed))


@pytest.mark.parametrize("eight", EIGHT, ids=str)
def test_norm_at_the_start_of_the_stream(eight, backend):
    x = _randn(17, 64, dtype=torch.float32, device=backend.device)
    weight = _randn(64, dtype=torch.float32, device=backend.device, seed=2)
    run = backend.op("fused_quant", "add_rms_norm_quant")
    *actual, new_residual = run(x, None, weight, 1e-5, dtype=eight)
    assert torch.equal(new_residual, x)
    normed = backend.op("norm", "rms_norm")(x, weight, 1e-5)
    expected = backend.op("activations", EIGHT[eight])(normed)
    (_nearly if backend.name == "gpu" else _same)(actual, expected)


@pytest.mark.parametrize("eight", EIGHT, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 100), (17, 256), (63, 48)], ids=str)
def test_silu_mul_then_quantise(shape, eight, backend):
    product, quantize = backend.op("silu_mul", "silu_mul"), backend.op("activations", EIGHT[eight])
    run = backend.op("fused_quant", "silu_mul_quant")
    for dtype in backend.dtypes:
        gate_up = _randn(shape[0], 2 * shape[1], dtype=dtype, device=backend.device)
        _same(run(gate_up, dtype=eight), quantize(product(gate_up)))


def test_rows_of_a_wider_tensor(backend):
    wide = _randn(5, 3, 128, dtype=torch.float32, device=backend.device)
    run = backend.op("fused_quant", "silu_mul_quant")
    _same(run(wide[:, 1], dtype=torch.int8), run(wide[:, 1].contiguous(), dtype=torch.int8))
