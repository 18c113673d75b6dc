"""Few tokens by single warps: the assembly executed lane by lane, and on a GPU as it is."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from epd_kernels.activations import quantize_fp8, quantize_int8
from epd_kernels.launch import GemmConfig
from epd_kernels.packing import Format, QuantWeight, pack, quantize_weight
from epd_kernels.w4_few import takes_few
from epd_kernels.w4_gemm import w4_gemm_triton

from .test_warp_decode import DEVICES, device  # noqa: F401

SCHEMES = {
    "fp8": (Format.SM7, quantize_fp8, 128),
    "int8-groups": (Format.HI4, quantize_int8, 128),
    "int8-rows": (Format.HI4, quantize_int8, 0),
}
ONE_WARP = GemmConfig(16, 8, 1, 1, 1, use_ptx=True)


def _operands(scheme, m, n, k, where, seed=0):
    """(x, x_scales, packed in tiles, the fp64 product of the operands as they are)"""
    target, quantize, group = SCHEMES[scheme]
    rng = torch.Generator().manual_seed(seed)
    x, scales = quantize(torch.randn(m, k, generator=rng))
    canonical = quantize_weight(torch.randn(n, k, generator=rng), group_size=group or k)
    packed = pack(canonical, target).tiled().to(torch.device(where))
    expected = x.double() * scales.double()[:, None] @ canonical.dequantize().double().t()
    return x.to(where), scales.to(where), packed, expected


@DEVICES
@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("tokens", [(1, 8), (8, 8), (9, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_equals_dequantised_product(scheme, tokens, rows, device, assert_close):  # noqa: F811
    """Rows that end within a block, tokens within a group, and a residual and bias beside them."""
    m, most = tokens
    x, scales, packed, expected = _operands(scheme, m, 70, 512, device)
    rng = torch.Generator().manual_seed(1)
    bias, residual = torch.randn(70, generator=rng), torch.randn(m, 70, generator=rng)
    config = replace(ONE_WARP, block_n=rows, block_m=most, num_stages=2)
    out = w4_gemm_triton(
        x, packed, out_dtype=torch.float32, x_scales=scales, bias=bias.to(device),
        residual=residual.to(device), config=config,
    )  # fmt: skip
    assert_close(out, expected + bias.double() + residual.double())


@DEVICES
@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_every_code_and_order(ahead, device):  # noqa: F811
    """Exact integers through every tile: a code, an input or a tile out of place would show."""
    rng = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (80, 512), generator=rng, dtype=torch.int8)
    x = torch.randint(-127, 128, (5, 512), generator=rng, dtype=torch.int8)
    for groups in (1, 4):
        packed = pack(QuantWeight(codes, torch.ones(80, groups)), Format.HI4).tiled()
        out = w4_gemm_triton(
            x.to(device), packed.to(torch.device(device)), out_dtype=torch.float32,
            x_scales=torch.ones(5, device=device), config=replace(ONE_WARP, num_stages=ahead),
        )  # fmt: skip
        assert torch.equal(out.cpu().double(), x.double() @ codes.double().t())


@DEVICES
def test_every_e4m3_number_meets_every_code(device):  # noqa: F811
    """One-hot codes read back the finite numbers of a token, in their places, times the code."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x = numbers.float().nan_to_num(0).to(torch.float8_e4m3fn).view(2, 128)
    for code in (-7, -4, 1, 3, 6):
        codes = torch.eye(128, dtype=torch.int8) * code
        packed = pack(QuantWeight(codes, torch.ones(128, 1)), Format.SM7).tiled()
        out = w4_gemm_triton(
            x.to(device), packed.to(torch.device(device)), out_dtype=torch.float32,
            x_scales=torch.ones(2, device=device), config=ONE_WARP,
        )  # fmt: skip
        assert torch.equal(out.cpu(), x.float() * code)


def test_what_single_warps_take():
    x, _, packed, _ = _operands("fp8", 8, 64, 512, "cpu")
    assert takes_few(x, packed, ONE_WARP)
    assert takes_few(x, packed, replace(ONE_WARP, num_stages=4))
    assert not takes_few(x, packed, replace(ONE_WARP, num_stages=3))
    assert not takes_few(x, packed, replace(ONE_WARP, use_ptx=False))
    assert not takes_few(x.repeat(2, 1), packed, ONE_WARP)
    assert not takes_few(x, packed.row_major(), ONE_WARP)
    assert not takes_few(x.float(), packed, ONE_WARP)
    odd = torch.zeros(8, 520).to(torch.float8_e4m3fn)[:, 1:513]
    assert not takes_few(odd, packed, ONE_WARP)


def test_a_launch_one_warp_cannot_take_gives_way_to_the_rule(monkeypatch):
    """Tuned for another number of tiles than this weight has."""
    gemm = importlib.import_module("epd_kernels.w4_gemm")
    rule = GemmConfig(32, 16, 1, 4, 1)
    monkeypatch.setattr(
        gemm, "gemm_config",
        lambda *_, scheme="", **__: replace(ONE_WARP, num_stages=4) if scheme else rule,
    )  # fmt: skip
    for k, chosen in ((512, 1), (640, 4)):
        x, _, packed, _ = _operands("fp8", 8, 64, k, "cpu")
        assert gemm._config(x, packed, "w4a8-fp8-tiled").num_warps == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_model_shapes_and_determinism(scheme, m, gpu, assert_close):
    x, scales, packed, expected = _operands(scheme, m, 2112, 4096, gpu.device)
    config = replace(ONE_WARP, block_m=8 if m <= 8 else 16, num_stages=4, early=True)
    outs = [
        w4_gemm_triton(x, packed, out_dtype=torch.bfloat16, x_scales=scales, config=config)
        for _ in range(100)
    ]
    assert_close(outs[0], expected)
    assert all(torch.equal(out, outs[0]) for out in outs)
