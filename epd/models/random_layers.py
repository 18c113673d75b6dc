"""Linear layers with random weights, rounded to nearest and packed one at a time, so that a decoder
of any size takes the memory of its packed weights and of one layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from epd.models.layers import DecoderLayer
from epd.models.quantization import SCHEMES
from epd.models.quantized_layers import FUSED, HEAD
from epd_kernels import Fp8Linear, QuantLinear, Scheme, quantize_weight, quantize_weight_fp8

if TYPE_CHECKING:
    from collections.abc import Iterator

    from epd.models.decoder import Decoder
    from epd.models.text_config import DecoderConfig

__all__ = ["STANDARD_DEVIATION", "install_random", "linear_paths", "rounded"]

STANDARD_DEVIATION = 0.02
_GROUPS = (128, 64, 32)


def linear_paths(config: DecoderConfig, scheme: str) -> list[str]:
    """The linear layers of a decoder that `scheme` rounds, by their paths there.

    The head, unless tied, is among them where activations are in FP8, as `epd quantize` has it.
    """
    paths = [f"layers.{index}.{name}" for index in range(config.num_layers) for name in FUSED]
    fp8 = scheme in ("fp8", "w4a8-fp8") and config.hidden_size % 16 == 0
    return [*paths, HEAD] if fp8 and not config.tie_word_embeddings else paths


def install_random(decoder: Decoder, scheme: str, generator: torch.Generator) -> None:
    """Put quantised random layers at the paths of `linear_paths`."""
    template = DecoderLayer(decoder.config, dtype=decoder.dtype)

    def draw(*shape: int) -> torch.Tensor:
        numbers = torch.empty(shape, dtype=decoder.dtype, device=decoder.device)
        return numbers.normal_(0.0, STANDARD_DEVIATION, generator=generator)

    for path, shape in zip(linear_paths(decoder.config, scheme), _cycle(template), strict=False):
        if path == HEAD:
            rows = -(-decoder.config.vocab_size // 16) * 16  # the FP8 product asks for that
            decoder.head = Fp8Linear(quantize_weight_fp8(draw(rows, decoder.config.hidden_size)))
            continue
        weight = draw(*shape.weight.shape)
        bias = None if shape.bias is None else draw(len(weight))
        decoder.set_submodule(path, rounded(weight, scheme, bias=bias))


def rounded(
    weight: torch.Tensor, scheme: str, *, bias: torch.Tensor | None = None
) -> QuantLinear | Fp8Linear:
    """A layer over `weight [N, K]`, rounded to nearest, in groups of 128 inputs if they divide."""
    assert scheme in SCHEMES
    if scheme == "fp8":
        return Fp8Linear(quantize_weight_fp8(weight), bias=bias)
    width = weight.shape[1]
    group = next((size for size in _GROUPS if width % size == 0), width)
    return QuantLinear(quantize_weight(weight, group_size=group), Scheme(scheme), bias=bias)


def _cycle(template: DecoderLayer) -> Iterator[nn.Linear]:
    """The linear layers of one layer after another, without storage."""
    while True:
        for name in FUSED:
            found = template.get_submodule(name)
            assert isinstance(found, nn.Linear)
            yield found
