"""Eight-bit activations: error bounds, exact agreement of kernel and reference, encoder bits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from epd_kernels import quantize_fp8, quantize_int8, row_codes
from epd_kernels.activations import quantize_fp8_ref, quantize_int8_ref


def _rows(rows, width, dtype, seed=0):
    """Rows of very different sizes, the first all zeros."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=rng) * torch.logspace(-6, 4, rows or 1)[:rows, None]
    x[:1] = 0
    return x.to(dtype)


@pytest.mark.parametrize("width", [1, 100, 256])
@pytest.mark.parametrize("rows", [0, 1, 17, 63])
def test_fp8_is_nearest(rows, width, backend):
    run = backend.op("activations", "quantize_fp8")
    for dtype in (torch.float32, torch.bfloat16):
        x = _rows(rows, width, dtype).to(backend.device)
        codes, scales = run(x)
        assert codes.dtype == torch.float8_e4m3fn and scales.shape == (rows,)
        assert bool((codes.float().abs().amax(-1)[1:] == 448).all())
        assert not codes[:1].float().any()
        error = (codes.float() * scales[:, None] - x.float()).abs()
        # three mantissa bits: half a step is 1/16 of a value, or half of the smallest subnormal
        bound = (x.float().abs() / 16).maximum(scales[:, None] * 2.0**-10)
        assert bool((error <= bound * 1.0001).all())


@pytest.mark.parametrize("width", [1, 100, 256])
@pytest.mark.parametrize("rows", [0, 1, 17, 63])
def test_int8_is_nearest(rows, width, backend):
    run = backend.op("activations", "quantize_int8")
    for dtype in (torch.float32, torch.bfloat16):
        x = _rows(rows, width, dtype).to(backend.device)
        codes, scales = run(x)
        assert codes.dtype == torch.int8 and scales.shape == (rows,)
        assert bool((codes[1:].int().abs().amax(-1) == 127).all()) and not codes[:1].any()
        error = (codes * scales[:, None] - x.float()).abs()
        assert bool((error <= scales[:, None] * 0.50001).all())


@pytest.mark.parametrize("name", ["quantize_fp8", "quantize_int8"])
def test_kernel_equals_reference_bit_for_bit(name, backend):
    reference = {"quantize_fp8": quantize_fp8_ref, "quantize_int8": quantize_int8_ref}[name]
    x = _rows(40, 999, torch.float32, seed=1)
    for view in (x, x[::3], x[:, 5:600], x.t().contiguous().t()):
        codes, scales = backend.op("activations", name)(view.to(backend.device))
        expected, expected_scales = reference(view)
        assert torch.equal(scales.cpu(), expected_scales)
        assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_rows_of_any_size(backend):
    sizes = torch.tensor([0.0, 1e-38, 1e-30, 1e-13, 1e-11, 1e25, 1e38])[:, None]
    x = torch.randn(7, 300, generator=torch.Generator().manual_seed(2)).clamp(-3, 3) * sizes
    for eight, name in ((quantize_fp8_ref, "quantize_fp8"), (quantize_int8_ref, "quantize_int8")):
        (codes, scales), (expected, expected_scales) = (
            backend.op("activations", name)(x.to(backend.device)), eight(x)
        )  # fmt: skip
        assert torch.equal(scales.cpu(), expected_scales)
        assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_every_e4m3_number_and_every_tie(backend):
    """Each finite byte is itself; halfway between two neighbours goes to the even byte."""
    byte = torch.arange(127, dtype=torch.uint8)
    value = byte.view(torch.float8_e4m3fn).float()
    middle = (value[:-1] + value[1:]) / 2
    even = byte[:-1] + byte[:-1] % 2
    x = torch.cat((value, middle))[None]
    run = backend.op("activations", "quantize_fp8")
    for sign, bit in ((1, 0), (-1, 128)):
        codes, scales = run((sign * x).to(backend.device))
        assert scales.tolist() == [1.0]
        expected = torch.cat((byte, even)) | bit
        assert torch.equal(codes.cpu().view(torch.uint8)[0], expected)


def test_int8_ties_go_to_even(backend):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device=backend.device)
    codes, _ = backend.op("activations", "quantize_int8")(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_cpu_tensors_take_the_reference():
    x = _rows(5, 64, torch.float32)
    assert torch.equal(quantize_fp8(x)[0].float(), quantize_fp8_ref(x)[0].float())
    assert torch.equal(quantize_int8(x)[0], quantize_int8_ref(x)[0])


def _fused(a, b, c):
    """a * b + c rounded once: the fp64 product is exact, the sum rounded to odd before fp32."""
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    share = total - product
    lost = (product - (total - share)) + (c - share)
    bits = total.view(np.int64)
    away = np.where((lost > 0) == (total > 0), 1, -1)
    bits = np.where((lost != 0) & (bits % 2 == 0), bits + away, bits)
    return bits.view(np.float64).astype(np.float32)


@pytest.mark.parametrize(("digits", "steps"), [(7, 1), (10, 1), (23, 2)])
def test_a_quotient_by_the_reciprocal_is_rounded_correctly(digits, steps, monkeypatch):
    """The compiled kernel's way to divide; the interpreter, which has no fused product, divides."""
    rng = np.random.default_rng(digits)
    numbers = 1 + rng.integers(0, 1 << digits, 1 << 15) / (1 << digits)
    numbers = np.concatenate((numbers, -numbers, [0.0, -0.0])).astype(np.float32)
    exact = SimpleNamespace(
        div_rn=lambda a, b: np.float32(a) / b, fma=_fused, static_range=range,
        zeros_like=np.zeros_like,
    )  # fmt: skip
    monkeypatch.setattr(row_codes, "tl", exact)
    monkeypatch.setattr(row_codes, "_REFINED", True)
    run = getattr(row_codes._quotients, "fn", row_codes._quotients)
    hard = [1, 1 + 2**-23, 2 - 2**-23, 1.5]  # reciprocals near the ends of a binade, a short one
    for scale in np.array([*hard, *(1 + rng.random(60))], np.float32):
        quotients = run(numbers, scale, steps)
        assert np.array_equal(quotients.view(np.int32), (numbers / scale).view(np.int32))
