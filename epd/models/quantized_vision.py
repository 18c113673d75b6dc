"""Puts quantised linear layers into the vision tower and the projector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from epd.models.checkpoint import canonical_name
from epd.models.layouts import is_quantized
from epd.models.layouts.source import LayerSource
from epd.models.quantized_layers import build_linear, check_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from epd.models.checkpoint import Checkpoint
    from epd.models.quantization import Quantization

__all__ = ["drop_linears", "install_linears", "vision_linears", "vision_sources"]

Parts = dict[str, nn.Module]
"""Tower and projector by the prefix of their tensors."""


def vision_linears(parts: Parts) -> dict[str, nn.Linear]:
    """The plain linear layers of `parts` by the canonical prefix of their tensors."""
    return {
        canonical_name(f"{prefix}.{path}"): module
        for prefix, part in parts.items()
        for path, module in part.named_modules()
        if isinstance(module, nn.Linear)
    }


def vision_sources(
    parts: Parts, checkpoint: Checkpoint, quantization: Quantization | None
) -> dict[str, LayerSource]:
    """Those of `vision_linears` that the checkpoint stores quantised."""
    if quantization is None:
        return {}
    sources = {
        name: LayerSource(
            checkpoint=checkpoint, prefix=name, rows=linear.out_features,
            width=linear.in_features, quantization=quantization,
        )
        for name, linear in vision_linears(parts).items()
    }  # fmt: skip
    return {name: source for name, source in sources.items() if is_quantized(source)}


def drop_linears(parts: Parts, sources: Mapping[str, LayerSource]) -> None:
    """Take the layers of `sources` out of `parts`, so that they get no storage."""
    _replace(parts, {name: nn.Identity() for name in sources})


def install_linears(
    parts: Parts, sources: Mapping[str, LayerSource], device: torch.device, dtype: torch.dtype
) -> None:
    """Put the layers of `sources` where `drop_linears` took them out, on `device`."""
    check_device(device, sources.values())
    made = {name: build_linear([source], dtype).to(device) for name, source in sources.items()}
    _replace(parts, made)


def _replace(parts: Parts, modules: Mapping[str, nn.Module]) -> None:
    for prefix, part in parts.items():
        for path in [path for path, _ in part.named_modules() if path]:
            if (name := canonical_name(f"{prefix}.{path}")) in modules:
                part.set_submodule(path, modules[name])
