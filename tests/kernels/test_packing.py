"""Every nibble, byte, format and group boundary of the four-bit formats, exactly."""

from __future__ import annotations

import pytest
import torch

from epd_kernels import FormatError
from epd_kernels.activations import group_sums, quantize_fp8
from epd_kernels.packing import Format, QuantWeight, pack, quantize_weight

FORMATS = list(Format)
LOWEST = {Format.U4: -8, Format.SM7: -7, Format.HI4: -8}


def _pairs(target):
    """Rows holding every (A, B) pair of codes once: one row per A, B along the tile's half."""
    codes = torch.arange(LOWEST[target], 8, dtype=torch.int8)
    rows = torch.zeros(len(codes), 128, dtype=torch.int8)
    rows[:, :64] = codes[:, None]
    rows[:, 64 : 64 + len(codes)] = codes
    return codes, rows


def _words(byte, target):
    """The decode of the kernels: masks and shifts only, on unsigned bytes held in int32."""
    if target is Format.U4:
        return byte & 0x0F, byte >> 4
    if target is Format.HI4:
        return byte & 0xF0, byte << 4 & 0xF0
    return byte & 0x87, (byte >> 4 & 0x07) | (byte << 4 & 0x80)


def _value(word, target):
    """What the matrix unit sees in a decoded byte, in units of one code."""
    byte = word.to(torch.uint8)
    if target is Format.HI4:
        return byte.view(torch.int8).double() / 16
    value = byte.view(torch.float8_e4m3fn).double() * 512
    return value - 8 if target is Format.U4 else value


def test_small_bytes_are_e4m3_numbers():
    byte = torch.arange(16, dtype=torch.uint8)
    assert (byte.view(torch.float8_e4m3fn).double() * 512).tolist() == list(range(16))
    signed = (byte[:8] | 0x80).view(torch.float8_e4m3fn).double() * 512
    assert signed.tolist() == [-float(u) for u in range(8)]


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
def test_every_pair_of_codes(target):
    codes, rows = _pairs(target)
    packed = pack(QuantWeight(rows, torch.ones(len(rows), 1)), target)
    assert torch.equal(packed.unpack().codes, rows)
    a, b = (_value(w, target) for w in _words(packed.data.int(), target))
    assert torch.equal(a, rows[:, :64].double()) and torch.equal(b, rows[:, 64:].double())
    pairs = packed.data[:, : len(codes)]
    assert len(pairs.unique()) == pairs.numel()


@pytest.mark.parametrize("target", [Format.U4, Format.HI4], ids=lambda f: f.name)
def test_every_byte_is_a_pair(target):
    _, rows = _pairs(target)
    data = pack(QuantWeight(rows, torch.ones(16, 1)), target).data
    assert sorted(data[:, :16].flatten().tolist()) == list(range(256))


@pytest.mark.parametrize("target", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("width", "group_size"),
    [(32, 32), (48, 48), (128, 32), (128, 128), (192, 64), (256, 128), (320, 32), (384, 384)],
)
def test_round_trip(target, width, group_size):
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(LOWEST[target], 8, (17, width), generator=rng, dtype=torch.int8)
    scales = torch.rand(17, width // group_size, generator=rng) + 0.1
    zeros = None
    if target is Format.U4:
        zeros = torch.randint(-8, 8, scales.shape, generator=rng).float()
    packed = pack(QuantWeight(codes, scales, zeros), target)
    assert packed.data.shape == (17, -(-width // 128) * 64)
    back = packed.unpack()
    assert torch.equal(back.codes, codes) and torch.equal(back.scales, scales)
    if zeros is not None:
        assert torch.equal(back.zeros, zeros)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_do_not_touch_each_other(symmetric):
    """Each group's scale follows its own range, right up to its first and last column."""
    weight = torch.zeros(2, 256)
    for g in range(8):
        weight[:, g * 32], weight[:, g * 32 + 31] = 7.0 * 2**g, -7.0 * 2**g
    quant = quantize_weight(weight, group_size=32, symmetric=symmetric)
    step = 1.0 if symmetric else 14 / 15
    expected = torch.tensor([[step * 2**g for g in range(8)]]).expand(2, -1)
    torch.testing.assert_close(quant.scales, expected)
    error = (quant.dequantize() - weight).abs().view(2, 8, 32).amax(-1)
    assert bool((error <= (0 if symmetric else 0.5001) * expected).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantise_is_nearest(symmetric):
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(33, 256, generator=rng)
    weight[0] = 0
    quant = quantize_weight(weight, group_size=64, symmetric=symmetric)
    error = (quant.dequantize() - weight).abs().view(33, 4, 64)
    # at the edge of an asymmetric range the zero's own rounding adds up to another half step
    edge = 0.5 if symmetric else 1.0
    assert bool((error <= edge * quant.scales[:, :, None] * 1.0001).all())
    assert not quant.dequantize()[0].any()


@pytest.mark.parametrize(("group_size", "band"), [(128, 0.117), (4096, 0.158)])
def test_error_of_gaussian_weights(group_size, band):
    """The relative error of rounding Gaussian weights to absmax / 7, known per group size."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(2))
    error = quantize_weight(weight, group_size=group_size).dequantize() - weight
    assert float(error.norm() / weight.norm()) == pytest.approx(band, rel=0.05)


def test_refusals_name_what_was_found():
    ones = torch.ones(2, 1)
    codes = torch.zeros(2, 128, dtype=torch.int8)
    with pytest.raises(FormatError, match="48 does not divide K = 128"):
        quantize_weight(torch.zeros(2, 128), group_size=48)
    with pytest.raises(FormatError, match="group size 16"):
        QuantWeight(codes, torch.ones(2, 8))
    with pytest.raises(FormatError, match=r"\[3, 1\]|\(3, 1\)"):
        QuantWeight(codes, torch.ones(3, 1))
    with pytest.raises(FormatError, match="zeros of shape"):
        QuantWeight(codes, ones, torch.ones(2, 2))
    with pytest.raises(FormatError, match=r"-8\.\.7"):
        QuantWeight(codes + 8, ones)
    with pytest.raises(FormatError, match="finite"):
        quantize_weight(torch.full((2, 128), float("nan")), group_size=128)
    with pytest.raises(FormatError, match="found -8"):
        pack(QuantWeight(codes - 8, ones), Format.SM7)
    for target in (Format.SM7, Format.HI4):
        with pytest.raises(FormatError, match="holds no zeros"):
            pack(QuantWeight(codes, ones, ones), target)


def test_group_sums():
    codes, _ = quantize_fp8(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)))
    sums = group_sums(codes, 32)
    for m in range(3):
        for g in range(4):
            values = codes[m, g * 32 : g * 32 + 32].double()
            assert float(sums[m, g]) == pytest.approx(float(values.sum()), abs=1e-3)


@pytest.mark.parametrize("rows", [1, 64, 100])
def test_tiles_hold_the_same_weight(rows):
    """Row (64 i + r), byte (64 j + c) lies at [i, j, r, c], and comes back."""
    rng = torch.Generator().manual_seed(4)
    codes = torch.randint(-7, 8, (rows, 384), generator=rng, dtype=torch.int8)
    packed = pack(QuantWeight(codes, torch.ones(rows, 3)), Format.SM7)
    tiled = packed.tiled()
    assert tiled.data.shape == (-(-rows // 64), 3, 64, 64)
    assert torch.equal(tiled.data[-1, 2, (rows - 1) % 64], packed.data[-1, 128:])
    assert torch.equal(tiled.row_major().data, packed.data)
    assert torch.equal(tiled.unpack().codes, codes) and tiled.out_features == rows
