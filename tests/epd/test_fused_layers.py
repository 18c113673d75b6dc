"""A layer whose norms and gates leave eight-bit codes, against the separate ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from epd.kv.pool import KVPool
from epd.models import activations
from epd.models.activations import Activations, gated, linear, normed
from epd.models.context import AttentionBatch, ForwardContext
from epd.models.decoder import Decoder, DecoderConfig, Stream
from epd.models.layers import DecoderLayer
from epd.models.quantization import SCHEMES
from epd.models.rope import rope_angles
from epd_kernels import Fp8Linear, QuantLinear, add_rms_norm, rms_norm, silu_mul

CONFIG = DecoderConfig(
    vocab_size=97, hidden_size=128, intermediate_size=192, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=32, max_position=64, qkv_bias=True,
)  # fmt: skip
EIGHT_BIT = [scheme for scheme in SCHEMES if scheme != "w4a16"]


def _context(pool: KVPool, length: int) -> ForwardContext:
    batch = AttentionBatch(
        cu_seqlens_q=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.arange(4, dtype=torch.int32)[None], slot_mapping=torch.arange(length),
        max_seqlen_q=length, max_seqlen_k=length,
    )  # fmt: skip
    return ForwardContext(groups=(batch,), layer_group=(0,) * CONFIG.num_layers, kv=pool)


def _pool() -> KVPool:
    return KVPool(
        CONFIG.num_layers, num_blocks=4, block_size=4, num_kv_heads=2, head_dim=32,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip


def _unfused(
    decoder: Decoder, hidden: torch.Tensor, positions: torch.Tensor, context: ForwardContext
) -> torch.Tensor:
    """The decoder out of separate ops: every linear layer is given floats and quantises them."""
    cos, sin = rope_angles(positions, decoder.inverse_frequency, hidden.dtype)
    residual, delta = hidden, None
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        norm, eps = layer.input_norm, layer.input_norm.eps
        if delta is None:
            x = rms_norm(residual, norm.weight, eps)
        else:
            x, residual = add_rms_norm(delta, residual, norm.weight, eps)
        x = layer.attention(x, cos, sin, context, index)
        x, residual = add_rms_norm(x, residual, layer.post_attention_norm.weight, eps)
        mlp = layer.feed_forward
        delta = mlp.down_proj(silu_mul(mlp.gate_up_proj(x)))
    assert delta is not None
    return add_rms_norm(delta, residual, decoder.norm.weight, decoder.norm.eps)[0]


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_fused_layers_equal_the_separate_ops(scheme: str | None) -> None:
    decoder = Decoder.random(CONFIG, "cpu", torch.float32, scheme=scheme)
    hidden, positions = decoder.embed(torch.arange(20, 31)), torch.arange(11)
    pools = _pool(), _pool()
    found = decoder(hidden, positions, _context(pools[0], 11))
    expected = _unfused(decoder, hidden, positions, _context(pools[1], 11))
    assert torch.equal(found, expected)
    slots = pools[0].gather(range(4), 11), pools[1].gather(range(4), 11)
    assert all(torch.equal(a, b) for a, b in zip(*slots, strict=True))


@pytest.mark.parametrize("scheme", EIGHT_BIT)
def test_queries_and_keys_of_a_layer_equal_the_separate_ops(scheme: str) -> None:
    decoder = Decoder.random(CONFIG, "cpu", torch.float32, scheme=scheme)
    generator, positions = torch.Generator().manual_seed(2), torch.arange(6)
    delta, residual = torch.randn(2, 6, 128, generator=generator)
    cos, sin = rope_angles(positions, decoder.inverse_frequency, torch.float32)
    layer = decoder.layers[1]
    assert isinstance(layer, DecoderLayer)
    for stream in (Stream(delta, residual), Stream(None, residual)):
        x = rms_norm(stream.total(), layer.input_norm.weight, layer.input_norm.eps)
        q, k, _ = layer.attention.project(x, cos, sin)
        found = decoder.queries_keys(stream, positions, 1)
        assert torch.equal(found[0], q)
        assert torch.equal(found[1], k)


@pytest.mark.parametrize("scheme", EIGHT_BIT)
def test_no_layer_quantises_what_the_op_before_it_could(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder.random(CONFIG, "cpu", torch.float32, scheme=scheme)
    given: list[type[Any]] = []
    real: Callable[..., torch.Tensor] = activations.linear

    def note(layer: Any, x: Any) -> torch.Tensor:
        given.append(type(x))
        return real(layer, x)

    monkeypatch.setattr("epd.models.layers.linear", note)
    decoder(decoder.embed(torch.arange(5)), torch.arange(5), _context(_pool(), 5))
    assert given == [Activations] * 3 * CONFIG.num_layers


def test_activations_keep_their_dtype() -> None:
    layer = Decoder.random(CONFIG, "cpu", torch.bfloat16, scheme="w4a8-int8").layers[0]
    assert isinstance(layer, DecoderLayer)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    entered, residual = normed(
        x, None, layer.input_norm.weight, 1e-5, reader=layer.attention.qkv_proj
    )
    assert isinstance(entered, Activations)
    assert entered.codes.dtype == torch.int8 and entered.scales.shape == (3,)
    assert residual is x
    assert linear(layer.attention.qkv_proj, entered).dtype == torch.bfloat16
    gate_up = torch.randn(3, 384, generator=torch.Generator().manual_seed(1))
    plain = gated(gate_up, reader=layer.attention)
    assert isinstance(plain, torch.Tensor)
    assert torch.equal(plain, silu_mul(gate_up))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_layers_are_their_rounded_weights(scheme: str) -> None:
    decoder = Decoder.random(CONFIG, "cpu", torch.float32, scheme=scheme, seed=4)
    kinds = {type(m) for m in decoder.layers.modules()} & {QuantLinear, Fp8Linear, torch.nn.Linear}
    assert kinds == {Fp8Linear if scheme == "fp8" else QuantLinear}
    plain = Decoder.random(CONFIG, "cpu", torch.float32, seed=4)
    assert isinstance(decoder.head, Fp8Linear) == (scheme in ("fp8", "w4a8-fp8"))
    assert decoder.logits(torch.ones(2, 128)).shape == (2, CONFIG.vocab_size)
    assert decoder.resident_bytes() < 0.8 * plain.resident_bytes()
    layer = decoder.get_submodule("layers.1.feed_forward.down_proj")
    out = linear(layer, torch.eye(192))
    # random inputs of deviation 0.02 leave weights of deviation 0.02, a sixteenth of it rounded off
    assert out.std().item() == pytest.approx(0.02, rel=0.05)
    again = Decoder.random(CONFIG, "cpu", torch.float32, scheme=scheme, seed=4)
    assert torch.equal(linear(again.get_submodule("layers.1.feed_forward.down_proj"),
                              torch.eye(192)), out)  # fmt: skip
