"""The layers of a Llama-family decoder over packed tokens and a paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from epd.models.activations import Activations, gated, linear, normed, token_count
from epd_kernels import (
    HeadNorms,
    QuantKV,
    add_rms_norm,
    apply_rope,
    paged_attention,
    quantized_attention,
    rms_norm,
    rope_store_kv,
    store_kv,
)

if TYPE_CHECKING:
    from epd.models.context import ForwardContext
    from epd.models.text_config import DecoderConfig

__all__ = ["Attention", "DecoderLayer", "FeedForward", "RMSNorm"]


def _linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    """A linear layer without storage; the decoder allocates all layers at once on its device."""
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device="meta")


class RMSNorm(nn.Module):
    """Root-mean-square norm, alone or after adding the residual."""

    def __init__(self, width: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device="meta"))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., width]`, normalised and scaled."""
        return rms_norm(x, self.weight, self.eps)

    def after_add(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of `x + residual`, and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def before(
        self, reader: nn.Module, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor | Activations, torch.Tensor]:
        """The norm of `x + residual` as the linear layer `reader` takes it, and the sum."""
        return normed(x, residual, self.weight, self.eps, reader=reader)


class Attention(nn.Module):
    """Grouped-query attention with one fused qkv projection.

    `kv_factors` fp32 `[Hkv, head_dim]` multiply keys before they are coded and divide queries.
    """

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.scale = config.head_dim**-0.5
        hidden, q_width = config.hidden_size, config.num_heads * config.head_dim
        self.qkv_proj = _linear(hidden, sum(self.heads) * config.head_dim, config.qkv_bias, dtype)
        self.o_proj = _linear(q_width, hidden, config.o_bias, dtype)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
        self.kv_factors: torch.Tensor | None = None

    def forward(
        self,
        x: torch.Tensor | Activations,
        cos: torch.Tensor,
        sin: torch.Tensor,
        context: ForwardContext,
        layer: int,
    ) -> torch.Tensor:
        """Attention output `[T, hidden]` of `x [T, hidden]`; keys and values enter the cache."""
        q, k, v = self._split(x)
        batch = context.groups[context.layer_group[layer]]
        k_cache, v_cache = context.kv.layer(layer)
        shape: dict[str, Any] = {
            "block_tables": batch.block_tables, "cu_seqlens_q": batch.cu_seqlens_q,
            "seq_lens": batch.seq_lens, "scale": self.scale, "max_seqlen_q": batch.max_seqlen_q,
            "max_seqlen_k": batch.max_seqlen_k,
        }  # fmt: skip
        tap = context.tap if context.tap is not None and context.tap.layer == layer else None
        if isinstance(k_cache, QuantKV) and isinstance(v_cache, QuantKV):
            if tap is not None:
                tap.queries, tap.keys = self._positioned(q, k, cos, sin)
            q = rope_store_kv(
                q, k, v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache,
                slot_mapping=batch.slot_mapping, norms=self._norms(), factors=self.kv_factors,
            )  # fmt: skip
            out = quantized_attention(q, k_cache, v_cache, **shape)
        else:
            assert isinstance(k_cache, torch.Tensor)
            assert isinstance(v_cache, torch.Tensor)
            q, k = self._positioned(q, k, cos, sin)
            if tap is not None:
                tap.queries, tap.keys = q, k
            store_kv(k, v, k_cache, v_cache, batch.slot_mapping)
            out = paged_attention(q, k_cache, v_cache, **shape)
        return self.o_proj(out.reshape(token_count(x), -1))  # type: ignore[no-any-return]

    def project(
        self, x: torch.Tensor | Activations, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys (both after RoPE) and values `[T, heads, head_dim]` of `x [T, hidden]`."""
        q, k, v = self._split(x)
        return *self._positioned(q, k, cos, sin), v

    def _split(
        self, x: torch.Tensor | Activations
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = linear(self.qkv_proj, x).view(token_count(x), -1, self.head_dim)
        q, k, v = heads.split(self.heads, dim=1)  # type: ignore[no-untyped-call]
        return q, k, v

    def _positioned(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys normed, where the model does, and rotated."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rope(q, k, cos, sin)

    def _norms(self) -> HeadNorms | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)


class FeedForward(nn.Module):
    """SwiGLU with gate and up projected together."""

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = _linear(hidden, 2 * inner, config.mlp_bias, dtype)
        self.down_proj = _linear(inner, hidden, config.mlp_bias, dtype)

    def forward(self, x: torch.Tensor | Activations) -> torch.Tensor:
        """`[T, hidden]` from `[T, hidden]`."""
        gate_up = linear(self.gate_up_proj, x)
        return linear(self.down_proj, gated(gate_up, reader=self.down_proj))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        eps, hidden = config.rms_norm_eps, config.hidden_size
        self.input_norm = RMSNorm(hidden, eps=eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype)
        self.post_attention_norm = RMSNorm(hidden, eps=eps, dtype=dtype)
        self.feed_forward = FeedForward(config, dtype=dtype)

    def enter(
        self, delta: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor | Activations, torch.Tensor]:
        """What attention reads, and the residual stream with the previous layer's `delta` in it."""
        reader = self.attention.qkv_proj
        if delta is None:
            return self.input_norm.before(reader, residual, None)
        return self.input_norm.before(reader, delta, residual)

    def leave(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the feed-forward adds, and the residual stream with attention's `x` in it."""
        entered, residual = self.post_attention_norm.before(
            self.feed_forward.gate_up_proj, x, residual
        )
        return self.feed_forward(entered), residual
