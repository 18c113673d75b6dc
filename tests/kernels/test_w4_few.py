"""Few tokens by single warps: the assembly executed lane by lane, and on a GPU as it is."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from epd_kernels.activations import quantize_int8
from epd_kernels.launch import GemmConfig
from epd_kernels.packing import Format, QuantWeight, pack, quantize_weight
from epd_kernels.w4_few import takes_few
from epd_kernels.w4_gemm import w4_gemm_triton

from .test_warp_decode import DEVICES, device  # noqa: F401

GROUPS = {
    "groups": 128,
    "rows": 0,
}
ONE_WARP = GemmConfig(16, 8, 1, 1, 1, use_ptx=True)


def _operands(scheme, m, n, k, where, seed=0):
    """(x, x_scales, packed in tiles, the fp64 product of the operands as they are)"""
    rng = torch.Generator().manual_seed(seed)
    x, scales = quantize_int8(torch.randn(m, k, generator=rng))
    canonical = quantize_weight(torch.randn(n, k, generator=rng), group_size=GROUPS[scheme] or k)
    packed = pack(canonical, Format.HI4).tiled().to(torch.device(where))
    expected = x.double() * scales.double()[:, None] @ canonical.dequantize().double().t()
    return x.to(where), scales.to(where), packed, expected


@DEVICES
@pytest.mark.parametrize("rows", [16, 70, 128])
@pytest.mark.parametrize("tokens", [1, 5, 8])
@pytest.mark.parametrize("scheme", GROUPS)
def test_equals_dequantised_product(scheme, tokens, rows, device, assert_close):  # noqa: F811
    """Rows that end within a block, fewer tokens than columns, a bias and a residual."""
    x, scales, packed, expected = _operands(scheme, tokens, rows, 512, device)
    rng = torch.Generator().manual_seed(1)
    bias, residual = torch.randn(rows, generator=rng), torch.randn(tokens, rows, generator=rng)
    out = w4_gemm_triton(
        x, packed, out_dtype=torch.float32, x_scales=scales, bias=bias.to(device),
        residual=residual.to(device), config=replace(ONE_WARP, num_stages=2),
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


def test_what_single_warps_take():
    x, _, packed, _ = _operands("groups", 8, 64, 512, "cpu")
    assert takes_few(x, packed, ONE_WARP)
    assert takes_few(x, packed, replace(ONE_WARP, num_stages=4))
    assert not takes_few(x, packed, replace(ONE_WARP, num_stages=3))
    assert not takes_few(x, packed, replace(ONE_WARP, use_ptx=False))
    assert not takes_few(x.repeat(2, 1), packed, ONE_WARP)
    assert not takes_few(x, packed.row_major(), ONE_WARP)
    assert not takes_few(x.float(), packed, ONE_WARP)
    odd = torch.zeros(8, 520, dtype=torch.int8)[:, 1:513]
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
        x, _, packed, _ = _operands("groups", 8, 64, k, "cpu")
        assert gemm._config(x, packed, "w4a8-int8-group-tiled").num_warps == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("scheme", GROUPS)
def test_model_shapes_and_determinism(scheme, m, gpu, assert_close):
    x, scales, packed, expected = _operands(scheme, m, 2112, 4096, gpu.device)
    config = replace(ONE_WARP, num_stages=4, early=True)
    outs = [
        w4_gemm_triton(x, packed, out_dtype=torch.bfloat16, x_scales=scales, config=config)
        for _ in range(100)
    ]
    assert_close(outs[0], expected)
    assert all(torch.equal(out, outs[0]) for out in outs)
