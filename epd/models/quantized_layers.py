"""Puts quantised linear layers into a decoder. The only place that knows there are any.

Projections that the decoder fuses are stored apart; their rows are joined here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from epd.models.files import problem
from epd.models.layouts import StoredLayer, StoredWeight, is_quantized, read_linear
from epd.models.layouts.source import LayerSource
from epd.models.quantization import MARKS
from epd_kernels import FormatError, Fp8Linear, Fp8Weight, QuantLinear, QuantWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from epd.models.checkpoint import Checkpoint
    from epd.models.decoder import Decoder
    from epd.models.quantization import Quantization
    from epd.models.text_config import DecoderConfig

__all__ = ["FUSED", "HEAD", "build_head", "build_linear", "check_device", "head_source",
           "install_layers", "layer_sources", "quantized_paths", "resident_bytes"]  # fmt: skip

HEAD = "head"
"""Where the decoder holds its LM head, which is in FP8 or plain."""

_FP8 = ("fp8", "w4a8-fp8")

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


def head_source(
    checkpoint: Checkpoint, config: DecoderConfig, quantization: Quantization
) -> LayerSource | None:
    """The head where it is stored in FP8, None where it is plain; refuses other codes by name."""
    source = LayerSource(
        checkpoint=checkpoint, prefix="lm_head", rows=config.vocab_size, width=config.hidden_size,
        quantization=quantization,
    )  # fmt: skip
    stored = source.dtype("weight")
    if stored == "F8_E4M3" and source.has("weight_scale"):
        return source
    if is_quantized(source):
        mark = next(mark for mark in MARKS if source.has(mark))
        found = f"codes in {stored or source.dtype(mark)}"
        source.refuse(mark, "a plain head, or e4m3 with one scale per row", found)
    return None


def quantized_paths(
    checkpoint: Checkpoint, config: DecoderConfig, quantization: Quantization
) -> dict[str, list[LayerSource]]:
    """The head and layers that are stored quantised.

    Raises `CheckpointError` where a fused layer is mixed, or the head in codes that it cannot have.
    """
    head = head_source(checkpoint, config, quantization)
    found = {} if head is None else {HEAD: [head]}
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
    check_device(decoder.device, [source for sources in paths.values() for source in sources])
    for path, sources in paths.items():
        parent, _, name = path.rpartition(".")
        linear = build_head(*sources) if path == HEAD else build_linear(sources, decoder.dtype)
        setattr(decoder.get_submodule(parent), name, linear.to(decoder.device))


def build_head(source: LayerSource) -> Fp8Linear:
    """The head, on the host, its rows padded to the 16 that the vendor's FP8 product asks for."""
    weight = read_linear(source).weight
    assert isinstance(weight, Fp8Weight), "head_source takes e4m3 alone"
    missing = -source.rows % 16
    codes = functional.pad(weight.codes.view(torch.uint8), (0, 0, 0, missing))
    scales = functional.pad(weight.scales, (0, missing), value=1.0)
    return Fp8Linear(Fp8Weight(codes.view(torch.float8_e4m3fn), scales))


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


def resident_bytes(model: nn.Module) -> int:
    """Bytes that the weights of `model` hold, plain and packed."""
    plain = sum(p.numel() * p.element_size() for p in model.parameters())
    packed = (m for m in model.modules() if isinstance(m, (QuantLinear, Fp8Linear)))
    return plain + sum(module.resident_bytes() for module in packed)


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


def check_device(device: torch.device, sources: Iterable[LayerSource]) -> None:
    """Raise `CheckpointError` on a GPU that cannot compute with one of `sources`."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    for source in sources:
        eight = source.quantization.scheme in _FP8 or source.dtype("weight") == "F8_E4M3"
        least = (8, 9) if eight else (8, 0)
        if found < least:
            raise problem(
                "Cannot serve quantised weights on this GPU.",
                f"Its compute capability is {found[0]}.{found[1]}; {source.prefix} "
                f"needs {least[0]}.{least[1]} or later for {'FP8' if eight else 'its codes'}.",
                "Use a newer GPU, or the checkpoint with plain weights.",
            )
