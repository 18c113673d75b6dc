"""Which architectures are served, and by what. Importing this module imports no torch.

Each half is imported only when a worker asks for it, so one that decodes loads neither
transformers nor a vision weight, and one that encodes no decoder weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

    from epd.models.card import ModelCard
    from epd.models.decoder import Decoder
    from epd.models.vision import VisionEncoder

__all__ = ["load_decoder", "load_vision", "supported_models"]


@dataclass(frozen=True, slots=True)
class _Adapter:
    """Modules and class names of an architecture's two halves."""

    decoder: tuple[str, str]
    vision: tuple[str, str]


_ADAPTERS = {
    "llava": _Adapter(
        decoder=("epd.models.decoder", "Decoder"), vision=("epd.models.vision", "VisionEncoder")
    ),
}


def supported_models() -> tuple[str, ...]:
    """The `model_type` values of config.json that can be served."""
    return tuple(_ADAPTERS)


def load_decoder(
    card: ModelCard, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The decoder of a checkpoint, weights on `device`."""
    cls = _class(_ADAPTERS[card.model_type].decoder)
    return cast("type[Decoder]", cls).load(card, device, dtype)


def load_vision(
    card: ModelCard, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> VisionEncoder:
    """The vision encoder of a checkpoint, weights on `device`."""
    cls = _class(_ADAPTERS[card.model_type].vision)
    return cast("type[VisionEncoder]", cls).load(card, device, dtype)


def _class(where: tuple[str, str]) -> object:
    module, name = where
    return getattr(import_module(module), name)
