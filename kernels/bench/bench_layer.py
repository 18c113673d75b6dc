"""Time whole blocks of a decoder in each scheme: `python bench_layer.py -o FILE`.

The shapes are Llama-3-8B's. `ffn` is norm, up and gate, SwiGLU and down for 16 tokens, as decode
runs them. `prefill` is the linear and attention work of one layer, with the norms and quantisers
between them, for 16 prompts at once; tokens per second are those of 32 such layers. RoPE, the KV
store, the embedding and the LM head are not in it. Weights are random; every FFN is checked first
against the same over its dequantised weights. `--dry-run` does that alone, on small shapes on a
CPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timing import Results, Windows, copies_beyond_l2, measure_roofs, relative_error
from torch import nn
from torch.nn import functional

from epd_kernels import (
    QuantLinear,
    Scheme,
    add_rms_norm,
    add_rms_norm_quant,
    paged_attention,
    quantize_weight,
    silu_mul,
    silu_mul_quant,
)

LAYERS = 32
BLOCK = 16
SCHEMES = {
    "bf16": None, "w4a8-fp8": (Scheme.W4A8_FP8, 128), "w4a8-int8": (Scheme.W4A8_INT8, 0),
    "w4a16": (Scheme.W4A16, 128),
}  # fmt: skip
# eight-bit activations on both sides of a product, in a block of two or four of them
TOLERANCE = {"bf16": 0.01, "w4a16": 0.01, "w4a8-int8": 0.06, "w4a8-fp8": 0.09}


@dataclass(frozen=True)
class Sizes:
    """Widths of a decoder layer."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim

    @property
    def weights(self) -> int:
        """Elements of the four products."""
        attention = self.qkv * self.hidden + self.hidden * self.heads * self.dim
        return attention + 3 * self.inner * self.hidden


def _eight_bit(linear: nn.Module) -> torch.dtype | None:
    """The eight-bit dtype of a layer's activations, None where they keep their own."""
    return linear.activation_dtype if isinstance(linear, QuantLinear) else None


class Layer:
    """One decoder layer's products in one scheme, or in bf16."""

    def __init__(self, sizes: Sizes, scheme: str, device: str, *, seed: int = 0) -> None:
        self.sizes = sizes
        self._rng = torch.Generator(device).manual_seed(seed)
        self._choice = SCHEMES[scheme]
        self._device = device
        self.dense: dict[str, torch.Tensor] = {}
        self.qkv = self._linear("qkv", sizes.qkv, sizes.hidden)
        self.out = self._linear("out", sizes.hidden, sizes.heads * sizes.dim)
        self.gate_up = self._linear("gate_up", 2 * sizes.inner, sizes.hidden)
        self.down = self._linear("down", sizes.hidden, sizes.inner)
        self.norm = torch.ones(sizes.hidden, device=device, dtype=torch.bfloat16)

    def _linear(self, name: str, rows: int, width: int) -> QuantLinear | nn.Linear:
        weight = torch.randn(rows, width, generator=self._rng, device=self._device) / width**0.5
        if self._choice is None:
            self.dense[name] = weight.bfloat16()
            linear = nn.Linear(width, rows, bias=False, device="meta")
            linear.weight = nn.Parameter(self.dense[name], requires_grad=False)
            return linear
        scheme, group = self._choice
        canonical = quantize_weight(weight, group_size=group or width)
        self.dense[name] = canonical.dequantize().bfloat16()
        return QuantLinear(canonical, scheme)

    def ffn(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The second half of the layer; what is added to the residual stream after it."""
        gate_up, down, eight = self.gate_up, self.down, _eight_bit(self.gate_up)
        if eight is None:
            normed, _ = add_rms_norm(x, residual, self.norm, 1e-5)
            out: torch.Tensor = down(silu_mul(gate_up(normed)))
            return out
        codes, scales, _ = add_rms_norm_quant(x, residual, self.norm, 1e-5, dtype=eight)
        assert isinstance(gate_up, QuantLinear) and isinstance(down, QuantLinear)
        wide = gate_up.multiply(codes, scales, dtype=x.dtype)
        return down.multiply(*silu_mul_quant(wide, dtype=eight), dtype=x.dtype)

    def prefill(self, x: torch.Tensor, residual: torch.Tensor, *, prompts: Prompts) -> torch.Tensor:
        """The whole layer over packed prompts."""
        sizes, eight = self.sizes, _eight_bit(self.qkv)
        if eight is None:
            normed, residual = add_rms_norm(x, residual, self.norm, 1e-5)
            qkv = self.qkv(normed)
        else:
            codes, scales, residual = add_rms_norm_quant(x, residual, self.norm, 1e-5, dtype=eight)
            assert isinstance(self.qkv, QuantLinear)
            qkv = self.qkv.multiply(codes, scales, dtype=x.dtype)
        width = sizes.heads * sizes.dim
        attended = prompts.attend(qkv[:, :width].unflatten(1, (sizes.heads, sizes.dim)))
        return self.ffn(self.out(attended.flatten(1)), residual)

    def reference(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`ffn` in fp32 over the dequantised weights."""
        total = x.float() + residual.float()
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)
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


def tokens(count: int, sizes: Sizes, device: str) -> list[torch.Tensor]:
    return [
        torch.randn(count, sizes.hidden, device=device, dtype=torch.bfloat16) for _ in "xr"
    ]  # fmt: skip


def check(layer: Layer, scheme: str, device: str) -> float:
    """The FFN's distance from its reference; ends the run when it is too large."""
    inputs = tokens(16, layer.sizes, device)
    error = relative_error(layer.ffn(*inputs), layer.reference(*inputs))
    if not error <= TOLERANCE[scheme]:
        raise SystemExit(f"the {scheme} block is wrong: error {error:.1e}")
    return error


def dry_run() -> None:
    sizes = Sizes(128, 256, 4, 2, 32)
    for scheme in SCHEMES:
        layer = Layer(sizes, scheme, "cpu")
        error = check(layer, scheme, "cpu")
        out = layer.prefill(*tokens(40, sizes, "cpu"), prompts=Prompts(sizes, 2, 20, "cpu"))
        assert out.shape == (40, 128)
        print(f"{scheme}  error={error:.1e}  not timed")


def measure(results: Results, schemes: list[str]) -> None:
    sizes = Sizes()
    for scheme in schemes:
        layer = Layer(sizes, scheme, "cuda")
        error = check(layer, scheme, "cuda")
        kind = {"w4a8-fp8": "fp8", "w4a8-int8": "int8"}.get(scheme, "bf16")
        held = sizes.weights * (2 if scheme == "bf16" else 0.5)
        copies = min(copies_beyond_l2(int(held)), 4)
        layers = [layer, *(Layer(sizes, scheme, "cuda", seed=i) for i in range(1, copies))]
        x, residual = tokens(16, sizes, "cuda")
        ffn = 3 * sizes.inner * sizes.hidden
        time = results.add(
            "ffn", scheme, "M=16 Llama-3-8B", [partial(each.ffn, x, residual) for each in layers],
            num_bytes=held * ffn / sizes.weights, ops=2.0 * 16 * ffn, kind=kind, error=error,
        )  # fmt: skip
        print(f"ffn M=16 {scheme}: {time.p50:.1f} us", flush=True)
        del layers
        for length in (1024, 2048, 4096):
            prompts = Prompts(sizes, 16, length, "cuda")
            inputs = tokens(16 * length, sizes, "cuda")
            pairs = 16 * sizes.heads * length * (length + 1) / 2
            ops = 2.0 * 16 * length * sizes.weights + 4.0 * sizes.dim * pairs
            time = results.add(
                "prefill", scheme, f"16x{length} Llama-3-8B",
                [partial(layer.prefill, *inputs, prompts=prompts)],
                num_bytes=held, ops=ops, kind=kind, error=error,
            )  # fmt: skip
            rate = 16 * length / (LAYERS * time.p50 * 1e-6)
            print(f"prefill 16x{length} {scheme}: {time.p50:.0f} us a layer, {rate:.0f} tokens/s",
                  flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results.csv"))
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        dry_run()
    else:
        with torch.inference_mode():
            measure(Results(args.output, measure_roofs(), Windows(5, 10.0), quiet=True),
                    args.schemes)  # fmt: skip


if __name__ == "__main__":
    main()
