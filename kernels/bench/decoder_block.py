"""One decoder layer in one scheme, its paged keys and values, and the steps it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from epd_kernels import (
    KVFormat,
    QuantKV,
    QuantLinear,
    Scheme,
    add_rms_norm,
    add_rms_norm_quant,
    apply_rope,
    dequantize_kv,
    paged_attention,
    quantize_kv,
    quantize_weight,
    quantized_attention,
    rope_store_kv,
    silu_mul,
    silu_mul_quant,
    store_kv,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 16
SCHEMES = {
    "bf16": None, "w4a8-fp8": (Scheme.W4A8_FP8, 128), "w4a8-int8": (Scheme.W4A8_INT8, 0),
    "w4a16": (Scheme.W4A16, 128),
}  # fmt: skip
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Widths of a decoder layer."""

    name: str
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the four weights."""
        return {
            "qkv": (self.qkv, self.hidden), "out": (self.hidden, self.heads * self.dim),
            "gate_up": (2 * self.inner, self.hidden), "down": (self.hidden, self.inner),
        }  # fmt: skip

    @property
    def weights(self) -> int:
        """Elements of the four products."""
        return sum(rows * width for rows, width in self.products.values())

    @property
    def ffn_weights(self) -> int:
        """Elements of two of them."""
        return 3 * self.inner * self.hidden


LLAMA = Sizes("Llama-3-8B")
LLAVA = Sizes("LLaVA-1.5-7B", inner=11008, kv_heads=32)


@dataclass(frozen=True, slots=True)
class Entering:
    """What a product reads: floats, or codes with the scales of their tokens."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


class Layer:
    """One decoder layer's products in one scheme, or in bf16, and what lies between them.

    `dense` are bf16 weights by name for a layer in bf16; random ones without it.
    """

    def __init__(
        self, sizes: Sizes, scheme: str, device: str, *, seed: int = 0,
        dense: dict[str, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.sizes, self._choice, self._device = sizes, SCHEMES[scheme], device
        self._rng = torch.Generator(device).manual_seed(seed)
        self.dense = dict(dense or {})
        made = {name: self._linear(name, *shape) for name, shape in sizes.products.items()}
        self.qkv, self.out = made["qkv"], made["out"]
        self.gate_up, self.down = made["gate_up"], made["down"]
        self.norm = torch.ones(sizes.hidden, device=device, dtype=torch.bfloat16)
        self._eight = None
        if isinstance(self.qkv, QuantLinear):
            self._eight = self.qkv.activation_dtype

    def _linear(self, name: str, rows: int, width: int) -> QuantLinear | nn.Linear:
        if self._choice is None and name in self.dense:
            weight = self.dense[name]
        else:
            weight = torch.randn(rows, width, generator=self._rng, device=self._device)
            weight /= width**0.5
        if self._choice is None:
            self.dense[name] = weight.bfloat16()
            linear = nn.Linear(width, rows, bias=False, device="meta")
            linear.weight = nn.Parameter(self.dense[name], requires_grad=False)
            return linear
        scheme, group = self._choice
        canonical = quantize_weight(weight, group_size=group or width)
        self.dense[name] = canonical.dequantize().bfloat16()
        return QuantLinear(canonical, scheme)

    def widened(self) -> Layer:
        """The same layer in bf16, over what its codes mean."""
        return Layer(self.sizes, "bf16", self._device, dense=self.dense)

    def enter(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[Entering, torch.Tensor]:
        """The norm of `x + residual` as the next product reads it, and the sum."""
        if self._eight is None:
            normed, total = add_rms_norm(x, residual, self.norm, EPS)
            return Entering(normed), total
        *coded, total = add_rms_norm_quant(x, residual, self.norm, EPS, dtype=self._eight)
        return Entering(*coded), total

    def gate(self, gate_up: torch.Tensor) -> Entering:
        """The SwiGLU product as the next product reads it."""
        if self._eight is None:
            return Entering(silu_mul(gate_up))
        return Entering(*silu_mul_quant(gate_up, dtype=self._eight))

    def multiply(self, linear: nn.Module, x: Entering) -> torch.Tensor:
        if x.scales is None:
            return linear(x.values)  # type: ignore[no-any-return]
        assert isinstance(linear, QuantLinear)
        return linear.multiply(x.values, x.scales, dtype=torch.bfloat16)

    def ffn(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The second half of the layer; what is added to the residual stream after it."""
        entered, _ = self.enter(x, residual)
        return self.multiply(self.down, self.gate(self.multiply(self.gate_up, entered)))

    def ffn_parts(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> dict[str, Callable[[], object]]:  # fmt: skip
        """The steps of `ffn`, each over what those before it leave."""
        entered, _ = self.enter(x, residual)
        wide = self.multiply(self.gate_up, entered)
        return {
            "norm": partial(self.enter, x, residual),
            "gate_up": partial(self.multiply, self.gate_up, entered),
            "silu": partial(self.gate, wide),
            "down": partial(self.multiply, self.down, self.gate(wide)),
        }

    def prefill(self, x: torch.Tensor, residual: torch.Tensor, *, prompts: Prompts) -> torch.Tensor:
        """The whole layer over packed prompts, but RoPE and the store."""
        sizes = self.sizes
        entered, residual = self.enter(x, residual)
        qkv = self.multiply(self.qkv, entered)[:, : sizes.heads * sizes.dim]
        attended = prompts.attend(qkv.unflatten(1, (sizes.heads, sizes.dim)))
        return self.ffn(self.out(attended.flatten(1)), residual)

    def decode(self, x: torch.Tensor, residual: torch.Tensor, *, past: Past) -> torch.Tensor:
        """The whole layer for the next token of each sequence."""
        entered, residual = self.enter(x, residual)
        q = past.store(self.multiply(self.qkv, entered))
        return self.ffn(self.out(past.attend(q).flatten(1)), residual)

    def decode_parts(
        self, x: torch.Tensor, residual: torch.Tensor, *, past: Past
    ) -> dict[str, Callable[[], object]]:
        """The steps of `decode`, each over what those before it leave."""
        entered, residual = self.enter(x, residual)
        qkv = self.multiply(self.qkv, entered)
        q = past.store(qkv)
        attended = past.attend(q).flatten(1)
        return {
            "norm": partial(self.enter, x, residual),
            "qkv": partial(self.multiply, self.qkv, entered),
            "rope, store": partial(past.store, qkv),
            "attention": partial(past.attend, q),
            "out": partial(self.out, attended),
            **{f"ffn {k}": v for k, v in self.ffn_parts(self.out(attended), residual).items()},
        }

    def reference(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`ffn` in fp32 over the dequantised weights."""
        total = x.float() + residual.float()
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
        gate, up = (normed @ self.dense["gate_up"].float().t()).chunk(2, dim=-1)
        return (functional.silu(gate) * up) @ self.dense["down"].float().t()


class Prompts:
    """Paged keys and values of `count` prompts of `length` positions."""

    def __init__(self, sizes: Sizes, count: int, length: int, device: str) -> None:
        blocks = count * -(-length // BLOCK)
        shape = (blocks, BLOCK, sizes.kv_heads, sizes.dim)
        self._caches = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "kv"]
        tables = torch.arange(blocks, device=device, dtype=torch.int32).view(count, -1)
        lengths = torch.full((count,), length, device=device, dtype=torch.int32)
        starts = torch.arange(count + 1, device=device, dtype=torch.int32) * length
        self._options = {
            "block_tables": tables, "cu_seqlens_q": starts, "seq_lens": lengths,
            "scale": sizes.dim**-0.5, "max_seqlen_q": length, "max_seqlen_k": length,
        }  # fmt: skip

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        return paged_attention(q, *self._caches, **self._options)


class Past:
    """Keys and values of `count` sequences of `length` positions, the last of which comes next.

    In INT4 where `coded`, head by head in memory as the engine lays them, else in bf16.
    """

    def __init__(
        self, sizes: Sizes, count: int, length: int, device: str, *, coded: bool, seed: int = 0
    ) -> None:
        self.sizes, self.count, self._length, self._device = sizes, count, length, device
        rng = torch.Generator(device).manual_seed(seed)
        make = partial(torch.randn, generator=rng, device=device, dtype=torch.bfloat16)
        per = -(-length // BLOCK)
        shape = (count * per, BLOCK, sizes.kv_heads, sizes.dim)
        self.caches: list[torch.Tensor] | list[QuantKV] = [make(shape) for _ in "kv"]
        if coded:
            self.caches = [_by_heads(quantize_kv(make(shape), KVFormat.INT4)) for _ in "kv"]
        tables = torch.arange(count * per, device=device, dtype=torch.int32).view(count, per)
        last = length - 1
        self._slots = tables[:, last // BLOCK].long() * BLOCK + last % BLOCK
        angles = make(count, sizes.dim // 2).repeat(1, 2)
        self._angles = angles.cos(), angles.sin()
        self._options = {
            "block_tables": tables,
            "cu_seqlens_q": torch.arange(count + 1, device=device, dtype=torch.int32),
            "seq_lens": torch.full((count,), length, device=device, dtype=torch.int32),
            "scale": sizes.dim**-0.5, "max_seqlen_q": 1, "max_seqlen_k": length,
        }  # fmt: skip

    def widened(self) -> Past:
        """The same in bf16, as the codes say."""
        other = Past(self.sizes, self.count, self._length, self._device, coded=False)
        other.caches = [
            dequantize_kv(c).bfloat16() if isinstance(c, QuantKV) else c for c in self.caches
        ]
        other._angles = self._angles
        return other

    @property
    def bytes(self) -> float:
        """Of keys and values that are read."""
        sizes, coded = self.sizes, isinstance(self.caches[0], QuantKV)
        per_head = sizes.dim / 2 + 4 if coded else 2 * sizes.dim
        return 2.0 * self.count * self._length * sizes.kv_heads * per_head

    def store(self, qkv: torch.Tensor) -> torch.Tensor:
        """The queries of `qkv`, rotated; its keys and values enter the cache."""
        heads, kv = self.sizes.heads, self.sizes.kv_heads
        q, k, v = qkv.unflatten(1, (-1, self.sizes.dim)).split((heads, kv, kv), dim=1)
        k_cache, v_cache = self.caches
        cos, sin = self._angles
        if isinstance(k_cache, QuantKV) and isinstance(v_cache, QuantKV):
            return rope_store_kv(
                q, k, v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache,
                slot_mapping=self._slots,
            )  # fmt: skip
        assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
        q, k = apply_rope(q, k, cos, sin)
        store_kv(k, v, k_cache, v_cache, self._slots)
        return q

    def attend(self, q: torch.Tensor) -> torch.Tensor:
        k_cache, v_cache = self.caches
        if isinstance(k_cache, QuantKV) and isinstance(v_cache, QuantKV):
            return quantized_attention(q, k_cache, v_cache, **self._options)
        assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
        return paged_attention(q, k_cache, v_cache, **self._options)


def _by_heads(cache: QuantKV) -> QuantKV:
    return QuantKV(*(part.transpose(1, 2).contiguous().transpose(1, 2) for part in cache))
