"""One decoder layer as plain matrices, so that they can be measured, scaled, rotated and rounded.

It computes what `epd.models.layers.DecoderLayer` computes, on whole sequences and without a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from epd.kv.gate import coded
from epd.models.files import problem
from epd.models.rope import inverse_frequencies, rope_angles
from epd.models.text_config import DecoderConfig
from epd_kernels import KVFormat, apply_rope, rms_norm, silu_mul

if TYPE_CHECKING:
    from epd.models.checkpoint import Checkpoint

__all__ = ["POINTS", "Block", "Linear", "Sequences", "attend", "hadamard"]

POINTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linear layers by the input they share."""

_NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}

Linear = Callable[[str, torch.Tensor], torch.Tensor]
"""Point and its input `[T, K]` to its output `[T, N]`, rows of its layers joined."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Lengths of the sequences packed into `[T, hidden]`, each starting at position 0."""

    lengths: tuple[int, ...]

    def bounds(self) -> list[tuple[int, int]]:
        """First and last row (exclusive) of each."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return list(pairwise(ends))

    def first(self, tokens: int) -> Sequences:
        """As many whole sequences as fit in `tokens`, at least one."""
        kept: list[int] = []
        for length in self.lengths:
            if kept and sum(kept) + length > tokens:
                break
            kept.append(length)
        return Sequences(tuple(kept))


@dataclass(slots=True, eq=False)
class Block:
    """fp32 tensors of one layer by their names inside it, such as `mlp.up_proj.weight`.

    With `kv` its attention sees keys and values as codes would hold them; `kv_factors [Hkv, D]`
    multiply the keys before that.
    """

    config: DecoderConfig
    tensors: dict[str, torch.Tensor]
    kv: KVFormat | None = None
    kv_factors: torch.Tensor | None = None

    @classmethod
    def load(cls, checkpoint: Checkpoint, config: DecoderConfig, index: int) -> Block:
        """Layer `index`. Raises `CheckpointError` for a missing or non-finite tensor."""
        prefix = f"language_model.layers.{index}."
        tensors = {}
        for name in checkpoint.names(prefix):
            tensor = checkpoint.tensor(name).float()
            if not bool(tensor.isfinite().all()):
                raise problem(
                    f"Cannot quantise layer {index}.",
                    f"Tensor {name}: expected finite numbers, found NaN or infinity.",
                    "Repair or download the checkpoint again.",
                )
            tensors[name.removeprefix(prefix)] = tensor
        for name in (n for names in POINTS.values() for n in names):
            if f"{name}.weight" not in tensors:
                checkpoint.tensor(f"{prefix}{name}.weight")
        return cls(config, tensors)

    def copy(self) -> Block:
        """One whose tensors may be scaled without touching these."""
        return Block(self.config, dict(self.tensors), self.kv, self.kv_factors)

    def weight(self, point: str) -> torch.Tensor:
        """`[N, K]` of a point, the rows of its layers joined."""
        return torch.cat([self.tensors[f"{name}.weight"] for name in POINTS[point]])

    def bias(self, point: str) -> torch.Tensor | None:
        """`[N]`, None where the point has none."""
        if f"{POINTS[point][0]}.bias" not in self.tensors:
            return None
        return torch.cat([self.tensors[f"{name}.bias"] for name in POINTS[point]])

    def linear(self, point: str, x: torch.Tensor) -> torch.Tensor:
        """The point in floats."""
        return functional.linear(x, self.weight(point), self.bias(point))

    def forward(
        self, hidden: torch.Tensor, sequences: Sequences, linear: Linear | None = None
    ) -> torch.Tensor:
        """The residual stream `[T, hidden]` after this layer, its linear layers being `linear`."""
        linear = linear or self.linear
        x = self.norm("qkv", hidden)
        x = self.activate("qkv", linear("qkv", x), sequences)
        hidden = hidden + linear("o", x)
        x = self.norm("gate_up", hidden)
        x = self.activate("gate_up", linear("gate_up", x), sequences)
        return hidden + linear("down", x)

    def inputs(self, hidden: torch.Tensor, sequences: Sequences) -> dict[str, torch.Tensor]:
        """What each point reads when `hidden` enters the layer in floats."""
        seen: dict[str, torch.Tensor] = {}

        def record(point: str, x: torch.Tensor) -> torch.Tensor:
            seen[point] = x
            return self.linear(point, x)

        self.forward(hidden, sequences, record)
        return seen

    def norm(self, point: str, hidden: torch.Tensor) -> torch.Tensor:
        """What qkv or gate_up reads of the residual stream."""
        return rms_norm(hidden, self.tensors[f"{_NORMS[point]}.weight"], self.config.rms_norm_eps)

    def activate(self, point: str, y: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """What follows a point's output: attention, SwiGLU, or nothing."""
        if point == "qkv":
            return self._attend(y, sequences)
        return silu_mul(y) if point == "gate_up" else y

    def queries_keys_values(
        self, qkv: torch.Tensor, sequences: Sequences
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, `[T, heads, D]` of a joined projection."""
        config = self.config
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = torch.split(qkv.view(len(qkv), -1, config.head_dim), list(heads), dim=1)
        if config.qk_norm:
            q = rms_norm(q, self.tensors["self_attn.q_norm.weight"], config.rms_norm_eps)
            k = rms_norm(k, self.tensors["self_attn.k_norm.weight"], config.rms_norm_eps)
        positions = torch.cat([torch.arange(length) for length in sequences.lengths])
        frequency = inverse_frequencies(config.rope, config.head_dim)
        q, k = apply_rope(q, k, *rope_angles(positions, frequency, q.dtype))
        return q, k, v

    def _attend(self, qkv: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        q, k, v = self.queries_keys_values(qkv, sequences)
        if self.kv is not None:
            k, v = coded(k, v, self.kv, self.kv_factors)
        return attend(q, k, v, sequences)

    def scale_inputs(self, point: str, factors: torch.Tensor) -> None:
        """Multiply columns of the point by `factors [K]` and divide what produces its input.

        The layer computes the same function. For `o` the factors must be equal among query heads
        that share a KV head (see `tie`), because the values they come from are.
        """
        for name in POINTS[point]:
            self.tensors[f"{name}.weight"] = self.tensors[f"{name}.weight"] * factors
        if point in _NORMS:
            name = f"{_NORMS[point]}.weight"
            self.tensors[name] = self.tensors[name] / factors
            return
        producer = "self_attn.v_proj" if point == "o" else "mlp.up_proj"
        rows = self._per_kv_head(factors)[:, 0].flatten() if point == "o" else factors
        self.tensors[f"{producer}.weight"] = self.tensors[f"{producer}.weight"] / rows[:, None]
        if f"{producer}.bias" in self.tensors:
            self.tensors[f"{producer}.bias"] = self.tensors[f"{producer}.bias"] / rows

    def tie(self, point: str, factors: torch.Tensor) -> torch.Tensor:
        """`factors [K]` that `scale_inputs` can take: for `o`, geometric means over head groups."""
        if point != "o":
            return factors
        grouped = self._per_kv_head(factors)
        tied = grouped.log().mean(1, keepdim=True).exp()
        return tied.expand_as(grouped).flatten()

    def rotate_values(self) -> None:
        """Turn each head's values by a Hadamard matrix and turn them back in the output layer."""
        size = self.config.head_dim
        turn = hadamard(size)
        for kind in ("weight", "bias"):
            name = f"self_attn.v_proj.{kind}"
            if name in self.tensors:
                rows = self.tensors[name].view(self.config.num_kv_heads, size, -1)
                self.tensors[name] = (turn @ rows).view(self.tensors[name].shape)
        name = "self_attn.o_proj.weight"
        columns = self.tensors[name].view(self.config.hidden_size, -1, size)
        self.tensors[name] = (columns @ turn.t()).flatten(1)

    def _per_kv_head(self, factors: torch.Tensor) -> torch.Tensor:
        """`[Hkv, H / Hkv, D]`."""
        return factors.view(self.config.num_kv_heads, -1, self.config.head_dim)


def hadamard(size: int) -> torch.Tensor:
    """The orthogonal Hadamard matrix of a power of two, by Sylvester's doubling."""
    assert size & (size - 1) == 0
    matrix: torch.Tensor = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """`[T, H * D]`: causal attention within each sequence."""
    out = []
    for start, stop in sequences.bounds():
        one, two, three = (t[start:stop].transpose(0, 1)[None] for t in (q, k, v))
        attended = functional.scaled_dot_product_attention(
            one, two, three, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        out.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat(out)
