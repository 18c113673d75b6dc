"""The fused store against the steps it replaces, one op at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from epd_kernels import (
    HeadNorms,
    KVFormat,
    QuantKV,
    apply_rope,
    dequantize_kv,
    quantize_kv,
    rms_norm,
    rope_store_kv,
)


@dataclass(frozen=True)
class Case:
    """Tokens, query and KV heads, channels, rows of a block; what the model has."""

    tokens: int
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    block: int = 16
    normed: bool = False
    smoothed: bool = False

    def __str__(self) -> str:
        flags = "-norm" * self.normed + "-smooth" * self.smoothed
        return f"{self.tokens}x{self.heads}kv{self.kv_heads}d{self.dim}b{self.block}{flags}"


class Inputs:
    """Views into one fused qkv row, poisoned caches, and slots of which every fifth is padding."""

    def __init__(self, case: Case, target: KVFormat, dtype: torch.dtype, device: str) -> None:
        rng = torch.Generator().manual_seed(case.tokens)
        heads, kv_heads, dim = case.heads, case.kv_heads, case.dim
        fused = torch.randn(case.tokens, heads + 2 * kv_heads, dim, generator=rng)
        fused[:, heads : heads + kv_heads, ::7] *= 6
        fused = fused.to(dtype).to(device)
        self.qkv = fused.split((heads, kv_heads, kv_heads), dim=1)
        angles = torch.randn(case.tokens, dim // 2, generator=rng).repeat(1, 2) * 3
        self.cos, self.sin = (t.to(dtype).to(device) for t in (angles.cos(), angles.sin()))
        self.norms = self.factors = None
        if case.normed:
            weights = (torch.rand(2, dim, generator=rng) + 0.5).to(dtype).to(device)
            self.norms = HeadNorms(weights[0], weights[1], 1e-6)
        if case.smoothed:
            self.factors = (torch.rand(kv_heads, dim, generator=rng) + 0.2).to(device)
        num_blocks = case.tokens // case.block + 3
        shape = (num_blocks, case.block, kv_heads)
        self.caches = []
        for _ in "kv":
            codes = torch.full((*shape, target.width(dim)), 0x7F, dtype=torch.uint8)
            self.caches.append(QuantKV(codes.view(target.dtype).to(device),
                                       torch.full(shape, math.nan).to(device)))  # fmt: skip
        order = torch.randperm(num_blocks * case.block, generator=rng)[: case.tokens]
        order[4::5] = -1
        self.slots = order.to(device)

    def run(self, store):
        return store(
            *self.qkv, cos=self.cos, sin=self.sin, k_cache=self.caches[0],
            v_cache=self.caches[1], slot_mapping=self.slots, norms=self.norms,
            factors=self.factors,
        )  # fmt: skip


def expected(inputs: Inputs, target: KVFormat) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Queries, and what keys and values mean after coding, by the single ops, in fp32."""
    q, k, v = inputs.qkv
    if inputs.norms is not None:
        q, k = (
            rms_norm(x, w, inputs.norms.eps) for x, w in zip((q, k), inputs.norms[:2], strict=True)
        )
    q, k = apply_rope(q.float(), k.float(), inputs.cos.float(), inputs.sin.float())
    if inputs.factors is not None:
        group = q.shape[1] // k.shape[1]
        for h in range(q.shape[1]):
            q[:, h] /= inputs.factors[h // group]
        k = k * inputs.factors
    return q, [dequantize_kv(quantize_kv(x.float(), target)) for x in (k, v)]


def code_steps(size: torch.Tensor, scales: torch.Tensor, target: KVFormat) -> torch.Tensor:
    """How far apart codes lie around values of this size: e4m3 has eight per power of two."""
    if target is KVFormat.INT4:
        return scales.expand_as(size)
    return scales * 2 ** ((size / scales).clamp(min=2**-6).log2().floor() - 3)


CASES = [
    Case(1),
    Case(9, heads=8, kv_heads=2, dim=16, block=8),
    Case(11, normed=True),
    Case(11, smoothed=True),
    Case(21, heads=6, kv_heads=3, dim=24, block=7, normed=True, smoothed=True),
]
FORMATS = pytest.mark.parametrize("target", list(KVFormat), ids=lambda f: f.value)


@FORMATS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_single_steps(case, target, backend, assert_close):
    """Written slots mean what the steps give; other slots stay as they were.

    On a GPU a fused multiply-add, or a scale that torch divides by multiplying with a reciprocal,
    may tip a value halfway between two codes: at most one code, and at most in 0.5 % of them.
    """
    for dtype in backend.dtypes[1:]:
        inputs = Inputs(case, target, dtype, backend.device)
        before = [QuantKV(*(part.clone() for part in cache)) for cache in inputs.caches]
        queries, wanted = expected(inputs, target)
        out = inputs.run(backend.op("quantized_store", "rope_store_kv"))
        assert out.dtype == dtype
        assert_close(out, queries)
        for cache, old, rows in zip(inputs.caches, before, wanted, strict=True):
            slots = inputs.slots
            written = slots[slots >= 0]
            found, named = dequantize_kv(cache).flatten(0, 1)[written], rows[slots >= 0]
            distance, noise = (found - named).abs(), 1e-4 * rows.abs().amax()
            share = float((distance > noise).float().mean())
            assert share <= (5e-3 if backend.name == "gpu" else 0)
            scales = cache.scales.flatten(0, 1)[written, :, None]
            assert bool((distance <= code_steps(torch.maximum(found.abs(), named.abs()), scales,
                                                target) + noise).all())  # fmt: skip
            kept = torch.ones(cache.scales.shape[:2].numel(), dtype=torch.bool)
            kept[written.cpu()] = False
            for part, was in zip(cache, old, strict=True):
                a, b = (t.view(torch.uint8).cpu().flatten(0, 1)[kept] for t in (part, was))
                assert torch.equal(a, b)


@FORMATS
def test_reference_writes_exactly_the_coder_s_bytes(target):
    inputs = Inputs(Case(20, normed=True, smoothed=True), target, torch.float32, "cpu")
    inputs.run(rope_store_kv)
    coded = quantize_kv(inputs.qkv[2], target)
    kept = inputs.slots >= 0
    codes = inputs.caches[1].codes.view(torch.uint8).flatten(0, 1)[inputs.slots[kept]]
    assert torch.equal(codes, coded.codes.view(torch.uint8)[kept])
    assert torch.equal(
        inputs.caches[1].scales.flatten(0, 1)[inputs.slots[kept]], coded.scales[kept]
    )


@FORMATS
def test_scores_do_not_feel_the_factors(target, backend):
    """(q / f) . (f k) is q . k up to coding: factors move precision, not meaning."""
    plain, smooth = (
        Inputs(Case(20, smoothed=flag), target, torch.float32, backend.device)
        for flag in (False, True)
    )
    smooth.qkv, smooth.cos, smooth.sin = plain.qkv, plain.cos, plain.sin
    scores = []
    for inputs in (plain, smooth):
        q = inputs.run(backend.op("quantized_store", "rope_store_kv"))
        slots = inputs.slots[inputs.slots >= 0]
        keys = dequantize_kv(inputs.caches[0]).flatten(0, 1)[slots].repeat_interleave(2, dim=1)
        scores.append(torch.einsum("qhd,khd->hqk", q, keys))
    bound = 0.25 if target is KVFormat.INT4 else 0.06
    assert (scores[0] - scores[1]).norm() < bound * scores[0].norm()


def test_rows_of_zeros_and_no_tokens(backend):
    run = backend.op("quantized_store", "rope_store_kv")
    for target in KVFormat:
        inputs = Inputs(Case(6), target, torch.float32, backend.device)
        for part in inputs.qkv:
            part.zero_()
        inputs.run(run)
        for cache in inputs.caches:
            values = dequantize_kv(cache).flatten(0, 1)[inputs.slots[inputs.slots >= 0]]
            assert not values.any()
        empty = Inputs(Case(0), target, torch.float32, backend.device)
        assert empty.run(run).shape == (0, 4, 32)


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_two_to_the_31(gpu):
    """The last block of a cache whose codes take more than 2^31 bytes."""
    inputs = Inputs(Case(2, 32, 8, 128), KVFormat.INT4, torch.bfloat16, gpu.device)
    blocks = 2**31 // (16 * 8 * 64) + 2
    inputs.caches = [
        QuantKV(torch.zeros(blocks, 16, 8, 64, dtype=torch.uint8, device="cuda"),
                torch.zeros(blocks, 16, 8, device="cuda"))
        for _ in "kv"
    ]  # fmt: skip
    inputs.slots = torch.tensor([-1, blocks * 16 - 1], device="cuda")
    inputs.run(rope_store_kv)
    for cache in inputs.caches:
        assert bool((cache.scales[-1, -1] > 0).all())
        assert int(cache.scales.count_nonzero()) == 8
