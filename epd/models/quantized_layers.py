"""Puts quantised linear layers into a decoder. The only place that knows there are any.

Projections that the decoder fuses are stored apart; their rows are joined here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epd.models.files import problem
from epd.models.layouts import StoredLayer, StoredWeight, is_quantized, read_linear
from epd.models.layouts.source import LayerSource
from epd_kernels import FormatError, Fp8Linear, Fp8Weight, QuantLinear, QuantWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from epd.models.checkpoint import Checkpoint
    from epd.models.decoder import Decoder
    from epd.models.quantization import Quantization
    from epd.models.text_config import DecoderConfig

__all__ = ["FUSED", "build_linear", "install_layers", "layer_sources", "quantized_paths"]

FUSED = {
    "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.o_proj": ("self_attn.o_proj",),
    "feed_forward.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down_proj": ("mlp.down_proj",),
}


def layer_sources(
    checkpoint: Checkpoint, config: DecoderConfig, quantization: Quantization
) -> Iterator[tuple[str, list[LayerSource]]]:
    """Each linear layer of the decoder by its path there, with its stored parts."""
    q_width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (q_width, hidden), "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden), "self_attn.o_proj": (hidden, q_width),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for index in range(config.num_layers):
        for path, names in FUSED.items():
            yield f"layers.{index}.{path}", [
                LayerSource(
                    checkpoint=checkpoint, prefix=f"language_model.layers.{index}.{name}",
                    rows=shapes[name][0], width=shapes[name][1], quantization=quantization,
                )
                for name in names
            ]  # fmt: skip


def quantized_paths(
    checkpoint: Checkpoint, config: DecoderConfig, quantization: Quantization
) -> dict[str, list[LayerSource]]:
    """The layers that are stored quantised. Raises `CheckpointError` where a fused one is mixed."""
    found = {}
    for path, sources in layer_sources(checkpoint, config, quantization):
        quantized = [is_quantized(source) for source in sources]
        if all(quantized):
            found[path] = sources
        elif any(quantized):
            plain = sources[quantized.index(False)]
            other = sources[quantized.index(True)].prefix
            plain.refuse("weight", f"quantised weights as in {other}", "plain ones, or none")
    return found


def install_layers(decoder: Decoder, paths: dict[str, list[LayerSource]]) -> None:
    """Put the layers of `paths` into `decoder`, on its device, one at a time."""
    _check_device(decoder.device)
    for path, sources in paths.items():
        parent, name = path.rsplit(".", 1)
        linear = build_linear(sources, decoder.dtype).to(decoder.device)
        setattr(decoder.get_submodule(parent), name, linear)


def build_linear(sources: list[LayerSource], dtype: torch.dtype) -> QuantLinear | Fp8Linear:
    """One layer of stored parts, on the host. Raises `CheckpointError` if they do not fit."""
    parts = [read_linear(source) for source in sources]
    first, scheme = sources[0], sources[0].quantization.scheme
    if len({type(part.weight) for part in parts}) > 1:
        first.refuse("*", "one format for all parts of a fused layer", "several")
    bias = _joined_bias(parts, sources)
    bias = None if bias is None else bias.to(dtype)
    weight = _joined(first, [part.weight for part in parts])
    try:
        if isinstance(weight, Fp8Weight):
            return Fp8Linear(weight, bias=bias)
        return QuantLinear(weight, Scheme(scheme), bias=bias)
    except (FormatError, ValueError) as error:
        first.refuse("*", f"weights for scheme {scheme}", str(error))


def _joined(first: LayerSource, weights: list[StoredWeight]) -> StoredWeight:
    fp8 = [weight for weight in weights if isinstance(weight, Fp8Weight)]
    if fp8:
        codes = torch.cat([weight.codes.view(torch.uint8) for weight in fp8])
        scales = torch.cat([weight.scales for weight in fp8])
        return Fp8Weight(codes.view(torch.float8_e4m3fn), scales)
    four = [weight for weight in weights if isinstance(weight, QuantWeight)]
    sizes = {weight.group_size for weight in four}
    if len(sizes) > 1:
        first.refuse("*", "one group size for all parts of a fused layer", f"{sorted(sizes)}")
    zeros = None
    if any(weight.zeros is not None for weight in four):
        zeros = torch.cat([
            torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
            for weight in four
        ])  # fmt: skip
    codes, scales = (torch.cat([getattr(w, name) for w in four]) for name in ("codes", "scales"))
    return QuantWeight(codes, scales, zeros)


def _joined_bias(parts: list[StoredLayer], sources: list[LayerSource]) -> torch.Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    return torch.cat([
        torch.zeros(source.rows) if part.bias is None else part.bias.float()
        for part, source in zip(parts, sources, strict=True)
    ])  # fmt: skip


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise problem(
            "Cannot serve quantised weights on this GPU.",
            f"Its compute capability is {major}.{minor}; the kernels need 8.0 or later.",
            "Use a newer GPU, or the checkpoint with plain weights.",
        )
