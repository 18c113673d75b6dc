"""The decoder: one definition for Llama, Mistral, Qwen2 and Qwen3 checkpoints.

Tokens of all sequences are packed into one `[T, hidden]` batch; attention goes through a paged
KV cache that the caller owns. It computes what transformers computes, operation for operation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from epd.kv.formats import KV_PLAIN
from epd.models.checkpoint import Checkpoint, resolve_dtype
from epd.models.files import problem
from epd.models.layers import DecoderLayer, RMSNorm
from epd.models.quantized_layers import HEAD, install_layers, quantized_paths, resident_bytes
from epd.models.random_layers import STANDARD_DEVIATION, install_random, linear_paths
from epd.models.rope import inverse_frequencies, rope_angles
from epd.models.text_config import DecoderConfig
from epd_kernels import Fp8Linear

if TYPE_CHECKING:
    from epd.models.card import ModelCard
    from epd.models.context import ForwardContext

__all__ = ["Decoder", "DecoderConfig", "Stream"]

_EMBED = "language_model.embed_tokens.weight"
_HEAD = "lm_head.weight"


class Stream(NamedTuple):
    """The residual stream between layers: the last layer's output and what it is to be added to.

    Kept apart so that each addition is fused with the norm that follows it.
    """

    delta: torch.Tensor | None
    residual: torch.Tensor

    def total(self) -> torch.Tensor:
        """Their sum `[T, hidden]`."""
        return self.residual if self.delta is None else self.delta + self.residual

    def take(self, rows: torch.Tensor | slice) -> Stream:
        """The stream of some rows."""
        return Stream(None if self.delta is None else self.delta[rows], self.residual[rows])


class Decoder(nn.Module):
    """Embedding, layers, final norm and head. Build it with `load` or `random`.

    `kv_format` is how its keys and values were calibrated to be held.
    """

    inverse_frequency: torch.Tensor

    def __init__(
        self, config: DecoderConfig, device: torch.device | str, dtype: torch.dtype, *,
        without: Collection[str] = (),
    ) -> None:  # fmt: skip
        """`without` names linear layers that get no storage: the caller puts its own there."""
        super().__init__()
        self.config = config
        self.kv_format = KV_PLAIN
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        self.layers = nn.ModuleList(
            DecoderLayer(config, dtype=dtype) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head: nn.Parameter | Fp8Linear | None = None
        if not config.tie_word_embeddings and HEAD not in without:
            self.head = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        for path in without:
            if path != HEAD:
                self.set_submodule(path, nn.Identity())
        self.to_empty(device=device)
        self.requires_grad_(False)
        frequency = inverse_frequencies(config.rope, config.head_dim)
        self.register_buffer("inverse_frequency", frequency.to(device), persistent=False)

    @classmethod
    def load(
        cls, card: ModelCard, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Decoder:
        """The decoder of a checkpoint; no vision weight is read. Raises `CheckpointError`."""
        with Checkpoint(card) as checkpoint:
            paths = {}
            if card.quantization is not None:
                paths = quantized_paths(checkpoint, card.text, card.quantization)
            decoder = cls(card.text, device, resolve_dtype(device, dtype), without=paths)
            if card.quantization is not None:
                decoder.kv_format = card.quantization.kv
            install_layers(decoder, paths)
            decoder._load_factors(checkpoint)
            for target, name in decoder._sources():
                checkpoint.fill(target, name)
            decoder._load_vocabulary(checkpoint)
        return decoder

    @classmethod
    def random(
        cls,
        config: DecoderConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        *,
        scheme: str | None = None,
    ) -> Decoder:
        """A decoder of the given shape with seeded random weights, made in place on `device`.

        `scheme` rounds the linear layers to the nearest code, one at a time.
        """
        paths = linear_paths(config, scheme) if scheme is not None else ()
        decoder = cls(config, device, resolve_dtype(device, dtype), without=paths)
        generator = torch.Generator(device).manual_seed(seed)
        if scheme is not None:
            install_random(decoder, scheme, generator)
        for name, parameter in decoder.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        return decoder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and hidden states."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    def resident_bytes(self) -> int:
        """Bytes that the weights hold."""
        return resident_bytes(self)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[T, hidden]` of `input_ids [T]`, each below `vocab_size`."""
        return functional.embedding(input_ids, self.embedding)

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """`[T, hidden]` after all layers and the final norm; `positions` is int64 `[T]`."""
        stream = self.advance(Stream(None, hidden), positions, context, 0, len(self.layers))
        return self.finish(stream)

    def run_layers(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        context: ForwardContext,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """The residual stream `[T, hidden]` after layers `start` to `stop - 1`, not normed."""
        return self.advance(Stream(None, hidden), positions, context, start, stop).total()

    def advance(
        self, stream: Stream, positions: torch.Tensor, context: ForwardContext,
        start: int, stop: int,
    ) -> Stream:  # fmt: skip
        """`stream` after layers `start` to `stop - 1`; rows may be taken from it in between."""
        cos, sin = rope_angles(positions, self.inverse_frequency, stream.residual.dtype)
        delta, residual = stream
        for index in range(start, stop):
            layer = self._layer(index)
            x, residual = layer.enter(delta, residual)
            x = layer.attention(x, cos, sin, context, index)
            delta, residual = layer.leave(x, residual)
        return Stream(delta, residual)

    def finish(self, stream: Stream) -> torch.Tensor:
        """The final norm of `stream`: `[T, hidden]`, ready for `logits`."""
        if stream.delta is None:
            return self.final_norm(stream.residual)
        return self.norm.after_add(stream.delta, stream.residual)[0]

    def queries_keys(
        self, stream: Stream, positions: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, after RoPE, that `layer` will make of `stream`; nothing is stored."""
        cos, sin = rope_angles(positions, self.inverse_frequency, stream.residual.dtype)
        entered = self._layer(layer)
        q, k, _ = entered.attention.project(entered.enter(*stream)[0], cos, sin)
        return q, k

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `forward` does after the last layer: `[T, hidden]`, ready for `logits`."""
        normed: torch.Tensor = self.norm(hidden)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 scores `[S, vocab]` of normed hidden states `[S, hidden]`."""
        if isinstance(self.head, Fp8Linear):
            scores: torch.Tensor = self.head(hidden)[:, : self.config.vocab_size]
            return scores.float()
        head = self.embedding if self.head is None else self.head
        return functional.linear(hidden, head).float()

    def _layer(self, index: int) -> DecoderLayer:
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def _sources(self) -> Iterator[tuple[torch.Tensor, str]]:
        """Every parameter, or the rows of a fused one, with the checkpoint tensor it comes from."""
        yield self.norm.weight, "language_model.norm.weight"
        for index in range(len(self.layers)):
            layer = self._layer(index)
            prefix = f"language_model.layers.{index}."
            yield layer.input_norm.weight, prefix + "input_layernorm.weight"
            yield layer.post_attention_norm.weight, prefix + "post_attention_layernorm.weight"
            attention, mlp = layer.attention, layer.feed_forward
            widths = [count * attention.head_dim for count in attention.heads]
            names = [prefix + f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
            yield from _rows(attention.qkv_proj, names, widths)
            yield from _rows(attention.o_proj, [prefix + "self_attn.o_proj"], [-1])
            if attention.q_norm is not None and attention.k_norm is not None:
                yield attention.q_norm.weight, prefix + "self_attn.q_norm.weight"
                yield attention.k_norm.weight, prefix + "self_attn.k_norm.weight"
            inner = self.config.intermediate_size
            names = [prefix + f"mlp.{name}" for name in ("gate_proj", "up_proj")]
            yield from _rows(mlp.gate_up_proj, names, [inner, inner])
            yield from _rows(mlp.down_proj, [prefix + "mlp.down_proj"], [-1])

    def _load_factors(self, checkpoint: Checkpoint) -> None:
        """What keys are multiplied by before they are coded, where the quantiser left factors."""
        shape = (self.config.num_kv_heads, self.config.head_dim)
        for index in range(len(self.layers)):
            name = f"language_model.layers.{index}.self_attn.kv_factors"
            if name in checkpoint:
                factors = checkpoint.tensor(name, shape).float()
                if not bool((factors.isfinite() & (factors > 0)).all()):
                    raise problem(f"Cannot load tensor {name}.",
                                  "Expected positive numbers, found others.",
                                  "Quantise the model again.")  # fmt: skip
                self._layer(index).attention.kv_factors = factors.to(self.device)

    def _load_vocabulary(self, checkpoint: Checkpoint) -> None:
        """Embedding and head. Tied ones are stored once, or twice if training drove them apart."""
        if self.head is not None:
            checkpoint.fill(self.embedding, _EMBED)
            if isinstance(self.head, nn.Parameter):
                checkpoint.fill(self.head, _HEAD)
            return
        checkpoint.fill(self.embedding, _EMBED if _EMBED in checkpoint else _HEAD)
        if _EMBED in checkpoint and _HEAD in checkpoint:
            head = torch.empty_like(self.embedding)
            checkpoint.fill(head, _HEAD)
            if not torch.equal(head, self.embedding):
                self.head = nn.Parameter(head, requires_grad=False)


def _rows(
    linear: nn.Module, names: list[str], widths: list[int]
) -> Iterator[tuple[torch.Tensor, str]]:
    """Row ranges of a fused linear layer, in the order its parts are laid out."""
    if not isinstance(linear, nn.Linear):
        return  # quantised, and loaded by its own reader
    for kind in ("weight", "bias"):
        parameter = getattr(linear, kind)
        if parameter is not None:
            parts = [parameter] if len(widths) == 1 else parameter.split(widths)
            yield from zip(parts, (f"{name}.{kind}" for name in names), strict=True)
