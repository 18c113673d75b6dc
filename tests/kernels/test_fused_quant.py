"""Fused quantising ops equal the separate ones, code for code."""

from __future__ import annotations

import pytest
import torch

from epd_kernels import fused_quant, silu_mul_quant
from epd_kernels.launch import DeviceFacts

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
@pytest.mark.parametrize("shape", [(0, 64), (1, 100), (17, 256), (63, 48), (3, 5001)], ids=str)
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
        summed_alike = backend.name == "ref" or (backend.name == "interpreter" and shape[1] < 2048)
        (_same if summed_alike else _nearly)(actual, quantize(normed))


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
@pytest.mark.parametrize(
    "shape",
    [(0, 64), (1, 1), (1, 100), (17, 256), (63, 48), (1, 9001), (2, 5000), (5, 2100)],
    ids=str,
)
def test_silu_mul_then_quantise(shape, eight, backend):
    product, quantize = backend.op("silu_mul", "silu_mul"), backend.op("activations", EIGHT[eight])
    run = backend.op("fused_quant", "silu_mul_quant")
    for dtype in backend.dtypes:
        gate_up = _randn(shape[0], 2 * shape[1], dtype=dtype, device=backend.device)
        _same(run(gate_up, dtype=eight), quantize(product(gate_up)))


def test_chunks_pad_little(monkeypatch):
    monkeypatch.setattr(fused_quant, "device_facts", lambda _: DeviceFacts(90, 132))
    chunk = {(t, k): fused_quant._chunk(t, k, torch.device("cpu"))
             for t in (1, 132, 133) for k in (4096, 11008, 13824, 14336)}  # fmt: skip
    assert {key for key, size in chunk.items() if size == 2048} == {
        (t, k) for t in (1, 132) for k in (13824, 14336)
    }
    assert set(chunk.values()) == {2048, 4096}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_in_a_graph_behind_a_copy(tokens, gpu):
    """Kernels that wait by themselves for what is ahead of them, be it no kernel."""
    given = [_randn(tokens, 2 * 11008, dtype=torch.bfloat16, device="cuda", seed=i) for i in (0, 1)]
    held = torch.zeros_like(given[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        silu_mul_quant(held, dtype=torch.int8)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        source = held.clone()
        source.copy_(held)
        first = silu_mul_quant(source, dtype=torch.int8)
        again = silu_mul_quant(source, dtype=torch.int8)
    for x in (*given, given[0]):
        held.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        expected = gpu.op("activations", "quantize_int8")(gpu.op("silu_mul", "silu_mul")(x))
        _same(first, expected)
        _same(again, expected)


def test_rows_of_a_wider_tensor(backend):
    wide = _randn(5, 3, 128, dtype=torch.float32, device=backend.device)
    run = backend.op("fused_quant", "silu_mul_quant")
    _same(run(wide[:, 1], dtype=torch.int8), run(wide[:, 1].contiguous(), dtype=torch.int8))
