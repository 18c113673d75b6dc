"""Coded keys and values: every code, what a scale carries, and the size of the error."""

from __future__ import annotations

import pytest
import torch

from epd_kernels import FormatError, KVFormat, QuantKV, dequantize_kv, quantize_kv


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_byte_zero_and_scale_means_what_it_says():
    """All 256 bytes under all 16 zeros, with scales whose low mantissa bits are clear."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(16, 256, 1)
    steps = torch.tensor([1.0, 0.375, 2.0**-20, 3.0e8])
    for step in steps:
        bits = (step.view(torch.int32) & -16) | torch.arange(16, dtype=torch.int32)
        scales = bits.view(torch.float32).view(16, 1).expand(16, 256)
        out = dequantize_kv(QuantKV(codes, scales))
        for zero in range(16):
            for byte in range(256):
                low, high = out[zero, byte].tolist()
                exact = (step.view(torch.int32) & -16).view(torch.float32)
                assert low == float(((byte & 15) - zero) * exact)
                assert high == float(((byte >> 4) - zero) * exact)


def test_every_fp8_code_survives():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[codes.float().isfinite()].view(1, 1, -1)
    back = quantize_kv(dequantize_kv(QuantKV(finite, torch.full((1, 1), 0.5))), KVFormat.FP8)
    assert torch.equal(back.codes.float(), finite.float())
    assert back.scales.tolist() == [[0.5]]


@pytest.mark.parametrize("dim", [2, 32, 128])
def test_int4_error_is_at_most_one_step(dim):
    x = randn(17, 2, dim, seed=dim)
    x[0], x[1], x[2] = 0.0, 5.0, -3.0
    packed = quantize_kv(x, KVFormat.INT4)
    assert packed.codes.shape == (17, 2, dim // 2) and packed.head_dim == dim
    back = dequantize_kv(packed)
    assert not back[0].any()
    torch.testing.assert_close(back[1:3], x[1:3], rtol=2e-6, atol=0)
    steps = (packed.scales.view(torch.int32) & -16).view(torch.float32)
    assert bool(((back - x).abs() <= steps[..., None] * 1.0001).all())


def test_coding_twice_changes_nothing():
    """What was read from codes codes to itself, as a re-quantised hand-over would require."""
    for target in KVFormat:
        once = dequantize_kv(quantize_kv(randn(64, 4, 64), target))
        again = dequantize_kv(quantize_kv(once, target))
        assert (again - once).norm() <= 1e-6 * once.norm()


@pytest.mark.parametrize(
    ("target", "low", "high"), [(KVFormat.INT4, 0.09, 0.12), (KVFormat.FP8, 0.02, 0.03)]
)
def test_error_band_of_gaussian_rows(target, low, high):
    """Relative Frobenius error over heads of 128 channels."""
    x = randn(512, 8, 128)
    error = (dequantize_kv(quantize_kv(x, target)) - x).norm() / x.norm()
    assert low < float(error) < high


def test_nan_and_infinity_stay_visible():
    x = torch.ones(2, 1, 8)
    x[0, 0, 3], x[1, 0, 3] = float("nan"), float("inf")
    for target in KVFormat:
        assert not bool(dequantize_kv(quantize_kv(x, target)).isfinite().all(-1).any())


def test_odd_heads_are_refused():
    for target in KVFormat:
        with pytest.raises(FormatError, match="found 7"):
            quantize_kv(torch.zeros(1, 1, 7), target)
