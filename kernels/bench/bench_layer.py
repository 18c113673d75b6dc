"""Time whole blocks of a decoder in each scheme, and their parts: `python bench_layer.py -o FILE`.

`ffn` is norm, up and gate, SwiGLU and down of Llama-3-8B for 1, 16 and 64 tokens, as decode runs
them. `decode` is the whole layer of LLaVA-1.5-7B, norms and quantisers included, for the next token
of 1, 8 and 32 sequences of 1,024 positions, their keys and values in INT4 but beside bf16 weights.
Parts are timed apart, each over what those before it leave; launched behind one another, as in the
whole, one may begin while the last one ends. `prefill` is the linear and attention work of a layer
of Llama-3-8B, with the norms and quantisers between them, for 16 prompts at once; tokens per second
are those of 32 such layers. RoPE, the KV store, the embedding and the LM head are not in it.

Weights are random; every FFN is checked first against the same over its dequantised weights, and
every decode against bf16 over what the codes mean. `--dry-run` does that alone, on small shapes on
a CPU.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from decoder_block import LLAMA, LLAVA, SCHEMES, Layer, Past, Prompts, Sizes
from timing import Results, Windows, copies_beyond_l2, measure_roofs, relative_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from timing import Timing

LAYERS = 32
POSITIONS = 1024
BLOCKS = ("ffn", "decode", "prefill")
# eight-bit activations on both sides of a product, in a block of two or four of them
TOLERANCE = {"bf16": 0.01, "w4a16": 0.01, "w4a8-int8": 0.06, "w4a8-fp8": 0.09}


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


def check_decode(layer: Layer, scheme: str, past: Past, device: str) -> float:
    """The whole layer's distance from bf16; ends the run when it is too large."""
    inputs, wide = tokens(past.count, layer.sizes, device), past.widened()
    expected = layer.widened().decode(*inputs, past=wide)
    error = relative_error(layer.decode(*inputs, past=past), expected)
    if not error <= 1.5 * TOLERANCE[scheme]:
        raise SystemExit(f"the {scheme} layer is wrong: error {error:.1e}")
    return error


def dry_run() -> None:
    llama, llava = Sizes("small", 128, 256, 4, 2, 32), Sizes("small", 128, 256, 4, 4, 32)
    for scheme in SCHEMES:
        layer = Layer(llama, scheme, "cpu")
        error = check(layer, scheme, "cpu")
        out = layer.prefill(*tokens(40, llama, "cpu"), prompts=Prompts(llama, 2, 20, "cpu"))
        assert out.shape == (40, 128)
        print(f"{scheme}  error={error:.1e}  not timed")
        layer, past = Layer(llava, scheme, "cpu"), Past(llava, 3, 40, "cpu", coded=scheme != "bf16")
        error = check_decode(layer, scheme, past, "cpu")
        assert len(layer.decode_parts(*tokens(3, llava, "cpu"), past=past)) == 9
        print(f"{scheme}  decode error={error:.1e}  not timed")


class Bench:
    """Rows of one scheme's blocks, and lines that tell them."""

    def __init__(self, results: Results, scheme: str) -> None:
        self._results, self._scheme = results, scheme
        self._kind = {"w4a8-fp8": "fp8", "w4a8-int8": "int8"}.get(scheme, "bf16")
        self._width = 2.0 if scheme == "bf16" else 0.5

    def layers(self, sizes: Sizes) -> list[Layer]:
        """Enough of them that the next one's weights are not in the L2 cache."""
        copies = min(copies_beyond_l2(int(sizes.weights * self._width)), 4)
        return [Layer(sizes, self._scheme, "cuda", seed=i) for i in range(copies)]

    def ffn(self, layers: list[Layer], error: float, *, count: int) -> None:
        sizes = layers[0].sizes
        inputs = tokens(count, sizes, "cuda")
        calls = [partial(each.ffn, *inputs) for each in layers]
        shape = f"M={count} {sizes.name}"
        self._add("ffn", shape, calls, sizes.ffn_weights, count=count, error=error)
        self._parts("ffn", shape, [each.ffn_parts(*inputs) for each in layers], layers[0], count)

    def decode(self, layers: list[Layer], *, count: int) -> None:
        sizes = layers[0].sizes
        inputs = tokens(count, sizes, "cuda")
        coded = self._scheme != "bf16"
        make = partial(Past, sizes, count, POSITIONS, "cuda", coded=coded)
        first = make()
        # attention alone must not find its keys in the L2 cache either
        copies = max(copies_beyond_l2(int(first.bytes)), len(layers))
        pasts = [first, *(make(seed=i) for i in range(1, copies))]
        error = check_decode(layers[0], self._scheme, first, "cuda")
        pairs = list(zip(itertools.cycle(layers), pasts, strict=False))
        calls = [partial(each.decode, *inputs, past=past) for each, past in pairs]
        shape = f"S={count} L={POSITIONS} {sizes.name}"
        self._add("decode", shape, calls, sizes.weights, count=count, error=error,
                  more=first.bytes)  # fmt: skip
        parts = [each.decode_parts(*inputs, past=past) for each, past in pairs]
        self._parts("decode", shape, parts, layers[0], count, kv_bytes=first.bytes)

    def prefill(self, layer: Layer, error: float, *, length: int) -> None:
        sizes = layer.sizes
        prompts, inputs = Prompts(sizes, 16, length, "cuda"), tokens(16 * length, sizes, "cuda")
        pairs = 16 * sizes.heads * length * (length + 1) / 2
        time = self._add(
            "prefill", f"16x{length} {sizes.name}",
            [partial(layer.prefill, *inputs, prompts=prompts)], sizes.weights, count=16 * length,
            error=error, more_ops=4.0 * sizes.dim * pairs,
        )  # fmt: skip
        rate = 16 * length / (LAYERS * time.p50 * 1e-6)
        print(f"  {rate:.0f} tokens/s", flush=True)

    def _add(
        self, op: str, shape: str, calls: Sequence[Callable[[], object]], weights: int, *,
        count: int, error: float, more: float = 0.0, more_ops: float = 0.0,
    ) -> Timing:  # fmt: skip
        """Time a block of so many weights for `count` tokens."""
        time = self._results.add(
            op, self._scheme, shape, calls, num_bytes=self._width * weights + more,
            ops=2.0 * count * weights + more_ops, kind=self._kind, error=error,
        )  # fmt: skip
        print(f"{op} {shape} {self._scheme}: {time.p50:.1f} us", flush=True)
        return time

    def _parts(
        self, op: str, shape: str, parts: list[dict[str, Callable[[], object]]], layer: Layer,
        count: int, *, kv_bytes: float = 0.0,
    ) -> None:  # fmt: skip
        """Time each part; only weights, keys and values count as bytes."""
        times = {}
        for name in parts[0]:
            rows, width = layer.sizes.products.get(name.removeprefix("ffn "), (0, 0))
            num_bytes = self._width * rows * width + (kv_bytes if name == "attention" else 0.0)
            times[name] = self._results.add(
                f"{op}: {name}", self._scheme, shape, [each[name] for each in parts],
                num_bytes=num_bytes, ops=2.0 * count * rows * width, kind=self._kind, error=0.0,
            ).p50  # fmt: skip
        told = ", ".join(f"{name} {time:.1f}" for name, time in times.items())
        print(f"  {told}: {sum(times.values()):.1f}", flush=True)


def measure(results: Results, schemes: list[str], blocks: list[str]) -> None:
    for scheme in schemes:
        bench = Bench(results, scheme)
        if "ffn" in blocks or "prefill" in blocks:
            layers = bench.layers(LLAMA)
            error = check(layers[0], scheme, "cuda")
            for count in (1, 16, 64) if "ffn" in blocks else ():
                bench.ffn(layers, error, count=count)
            layer = layers[0]
            del layers
            for length in (1024, 2048, 4096) if "prefill" in blocks else ():
                bench.prefill(layer, error, length=length)
            del layer
        if "decode" in blocks:
            layers = bench.layers(LLAVA)
            for count in (1, 8, 32):
                bench.decode(layers, count=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("results.csv"))
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--blocks", nargs="*", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        dry_run()
    else:
        with torch.inference_mode():
            measure(Results(args.output, measure_roofs(), Windows(5, 10.0), quiet=True),
                    args.schemes, args.blocks)  # fmt: skip


if __name__ == "__main__":
    main()
