"""Norms, rotary embedding and the SwiGLU product against transformers' own Llama."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

ROWS = [1, 17, 63]


def _randn(*shape, dtype, device, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng).to(device, dtype)


def _llama_norm(weight, eps):
    norm = LlamaRMSNorm(len(weight), eps)
    norm.weight.data = weight
    return norm


@pytest.mark.parametrize("width", [16, 100, 1024])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm_equals_llama(rows, width, backend, assert_close):
    run = backend.op("norm", "rms_norm")
    for dtype in backend.dtypes:
        x = _randn(rows, width, dtype=dtype, device=backend.device)
        weight = _randn(width, dtype=dtype, device=backend.device, seed=1)
        out = run(x, weight, 1e-5)
        expected = _llama_norm(weight, 1e-5)(x)
        assert out.dtype == dtype
        if backend.name == "ref":
            assert torch.equal(out, expected)
        assert_close(out, expected)


def test_rms_norm_of_head_views(backend, assert_close):
    """qk-norm reads the heads of a fused qkv row in place."""
    fused = _randn(17, 6, 32, dtype=torch.float32, device=backend.device)
    weight = _randn(32, dtype=torch.float32, device=backend.device, seed=1)
    out = backend.op("norm", "rms_norm")(fused[:, 2:5], weight, 1e-6)
    assert_close(out, _llama_norm(weight, 1e-6)(fused[:, 2:5]))


def test_rms_norm_of_zeros_is_zero(backend):
    zeros = torch.zeros(3, 64, device=backend.device)
    out = backend.op("norm", "rms_norm")(zeros, torch.ones(64, device=backend.device), 1e-6)
    assert torch.equal(out, zeros)


@pytest.mark.parametrize("rows", [0, *ROWS])
def test_add_rms_norm_is_sum_then_norm(rows, backend, assert_close):
    run = backend.op("norm", "add_rms_norm")
    for dtype in backend.dtypes:
        x = _randn(rows, 48, dtype=dtype, device=backend.device)
        residual = _randn(rows, 48, dtype=dtype, device=backend.device, seed=1)
        weight = _randn(48, dtype=dtype, device=backend.device, seed=2)
        before = x.clone(), residual.clone()
        out, total = run(x, residual, weight, 1e-5)
        assert torch.equal(total, before[0] + before[1])
        assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
        assert_close(out, _llama_norm(weight, 1e-5)(total))


def _angles(rows, dim, dtype, device):
    """Different angles in the two halves: nothing may assume that they repeat."""
    angle = _randn(rows, dim, dtype=torch.float32, device=device, seed=3) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize(("rows", "dim"), [(0, 16), (1, 128), (17, 24), (17, 128), (63, 16)])
def test_rope_equals_llama(rows, dim, backend, assert_close):
    run = backend.op("rope", "apply_rope")
    for dtype in backend.dtypes:
        q = _randn(rows, 6, dim, dtype=dtype, device=backend.device)
        k = _randn(rows, 2, dim, dtype=dtype, device=backend.device, seed=1)
        cos, sin = _angles(rows, dim, dtype, backend.device)
        expected = apply_rotary_pos_emb(q, k, cos, sin)
        for out, want in zip(run(q, k, cos, sin), expected, strict=True):
            assert_close(out, want)
            if backend.name == "ref":
                assert torch.equal(out, want)


def test_rope_of_views_leaves_them_alone(backend, assert_close):
    fused = _randn(17, 7, 32, dtype=torch.float32, device=backend.device)
    before = fused.clone()
    cos, sin = _angles(17, 32, torch.float32, backend.device)
    q, k = fused[:, :4], fused[:, 4:6]
    out = backend.op("rope", "apply_rope")(q, k, cos, sin)
    assert torch.equal(fused, before)
    for got, want in zip(out, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert_close(got, want)


def test_rope_keeps_pair_lengths(backend):
    """A rotation by one angle per pair preserves the norm of the pair."""
    q = _randn(17, 2, 64, dtype=torch.float32, device=backend.device)
    angle = _randn(17, 32, dtype=torch.float32, device=backend.device, seed=1).repeat(1, 2)
    out, _ = backend.op("rope", "apply_rope")(q, q, angle.cos(), angle.sin())
    pairs = [x.view(17, 2, 2, 32).norm(dim=2) for x in (q, out)]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 100, 1024, 1500])
@pytest.mark.parametrize("rows", [0, *ROWS])
def test_silu_mul_equals_definition(rows, width, backend, assert_close):
    run = backend.op("silu_mul", "silu_mul")
    for dtype in backend.dtypes:
        gate_up = _randn(rows, 2 * width, dtype=dtype, device=backend.device) * 3
        out = run(gate_up)
        gate, up = gate_up.double().chunk(2, dim=-1)
        assert out.dtype == dtype
        assert_close(out, gate / (1 + (-gate).exp()) * up)


# NumPy, under the interpreter, warns where exp is rightly infinite
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_mul_of_extremes(backend):
    """No overflow where exp(-gate) leaves the range of fp32."""
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 200.0] + [2.0] * 4], device=backend.device)
    out = backend.op("silu_mul", "silu_mul")(gate_up)
    assert out.abs().tolist() == [[0.0, 0.0, 0.0, 400.0]]


@pytest.mark.parametrize("case", [(1, 2, 32, 16), (17, 1, 16, 8), (63, 8, 24, 32)], ids=str)
def test_store_kv_writes_only_its_slots(case, backend):
    tokens, heads, dim, block_size = case
    run = backend.op("kv_store", "store_kv")
    for dtype in backend.dtypes:
        num_blocks = tokens // block_size + 3
        shape = (num_blocks, block_size, heads, dim)
        caches = [torch.full(shape, math.nan, device=backend.device, dtype=dtype) for _ in "kv"]
        k, v = (
            _randn(tokens, heads, dim, dtype=dtype, device=backend.device, seed=s) for s in (1, 2)
        )
        order = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(0))
        slots = order[:tokens].to(backend.device)
        slots[::5] = -1
        run(k, v, *caches, slots)
        for cache, source in zip(caches, (k, v), strict=True):
            expected = torch.full((num_blocks * block_size, heads, dim), math.nan, dtype=dtype)
            for t, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    expected[slot] = source[t].cpu()
            actual = cache.cpu().flatten(0, 1)
            assert torch.equal(actual.nan_to_num(9e3), expected.nan_to_num(9e3))


def test_store_kv_into_one_layer_from_views(backend):
    """The caches are slices of one tensor over layers; k and v are slices of a qkv row."""
    layers = torch.zeros(4, 3, 2, 16, 2, 16, device=backend.device)
    fused = _randn(5, 8, 16, dtype=torch.float32, device=backend.device)
    slots = torch.tensor([3, 16, 63, -1, 31], device=backend.device)
    k_cache, v_cache = layers[:, 1, 0], layers[:, 1, 1]
    backend.op("kv_store", "store_kv")(fused[:, 4:6], fused[:, 6:], k_cache, v_cache, slots)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(k_cache[slot // 16, slot % 16], fused[t, 4:6])
            assert torch.equal(v_cache[slot // 16, slot % 16], fused[t, 6:])
    assert not layers[:, 0].any() and not layers[:, 2].any()
    assert int(layers.abs().sum(dim=(-1, -2)).count_nonzero()) == 8


def test_store_kv_of_nothing(backend):
    cache = torch.full((2, 16, 1, 8), 5.0, device=backend.device)
    empty = torch.zeros(0, 1, 8, device=backend.device)
    slots = torch.zeros(0, dtype=torch.int64, device=backend.device)
    backend.op("kv_store", "store_kv")(empty, empty, cache, cache, slots)
    assert bool((cache == 5.0).all())


@pytest.mark.gpu
@pytest.mark.slow
def test_store_kv_beyond_two_to_the_31(gpu):
    """Offsets past 2^31 elements land in the right slot."""
    cache = torch.zeros(2**31 // (16 * 128) + 2, 16, 1, 128, dtype=torch.float16, device="cuda")
    k = torch.ones(1, 1, 128, dtype=torch.float16, device="cuda")
    slot = cache.shape[0] * 16 - 1
    store = gpu.op("kv_store", "store_kv")
    store(k, k, cache, cache, torch.tensor([slot], device="cuda"))
    assert bool((cache[-1, -1] == 1).all()) and int(cache[-2:].count_nonzero()) == 128
