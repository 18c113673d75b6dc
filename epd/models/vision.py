"""The vision side: image processor, vision tower and projector of transformers.

`encode` gives what `LlavaModel.get_image_features` gives for the pixels that the checkpoint's own
processor makes. Preprocessing always takes the Pillow backend, so that pixels do not depend on
whether torchvision is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from epd.errors import InvalidRequestError, MediaError
from epd.models.alignment import read_alignment
from epd.models.checkpoint import Checkpoint, canonical_name, resolve_dtype
from epd.models.files import problem
from epd.models.pixels import ImageProcessor
from epd.models.quantized_layers import resident_bytes
from epd.models.quantized_vision import drop_linears, install_linears, vision_sources
from epd.models.tower_graphs import TowerGraphs
from epd.models.vision_probe import AttentionProbe
from epd_pruning.base import VisionInputs

if TYPE_CHECKING:
    from epd.graphs import Recorder
    from epd.models.card import ModelCard

__all__ = ["VisionEncoder", "restore_position_ids"]

_TOWERS = ("clip_vision_model", "siglip_vision_model")


class VisionEncoder:
    """Images in, vision tokens out. Build it with `load` or `random`."""

    def __init__(
        self, card: ModelCard, device: torch.device | str, dtype: torch.dtype, *,
        checkpoint: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        """With a `checkpoint`, linear layers that it stores quantised are there already."""
        self._config = _llava_config(card)
        self._layers = _feature_layers(self._config)
        self.tower, self.projector = _modules(self._config, max(self._layers), dtype)
        self.parts = {"vision_tower": self.tower, "multi_modal_projector": self.projector}
        sources = vision_sources(self.parts, checkpoint, card.quantization) if checkpoint else {}
        drop_linears(self.parts, sources)
        for module in (self.tower, self.projector):
            module.to_empty(device=device)
            module.requires_grad_(False).eval()
        restore_position_ids(self.tower)
        install_linears(self.parts, sources, torch.device(device), dtype)
        self._processor = ImageProcessor(card, self._config.vision_config.image_size)
        self.device, self.dtype = torch.device(device), dtype
        self._graphs: TowerGraphs | None = None
        self._alignment = read_alignment(card, self._config.vision_config.hidden_size)
        if self._alignment is not None:
            self._alignment = self._alignment.to(self.device, dtype)

    @classmethod
    def load(
        cls, card: ModelCard, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> VisionEncoder:
        """The vision encoder of a checkpoint; no decoder weight is read."""
        with Checkpoint(card) as checkpoint:
            encoder = cls(card, device, resolve_dtype(device, dtype), checkpoint=checkpoint)
            for target, name in encoder._parameters():
                checkpoint.fill(target, name)
        return encoder

    @classmethod
    def random(
        cls,
        card: ModelCard,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> VisionEncoder:
        """An encoder of the card's shape with seeded random weights, made in place on `device`."""
        encoder = cls(card, device, resolve_dtype(device, dtype))
        generator = torch.Generator(device).manual_seed(seed)
        for parameter, name in encoder._parameters():
            if "norm" in name or "layrnorm" in name:
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        return encoder

    @torch.no_grad()
    def repeat_with(self, recorder: Recorder | None, *, at_once: bool = True) -> None:
        """Repeat recordings of the tower for small batches, made now or when first needed.

        Without a `recorder` they are dropped: do so before the weights move.
        """
        self._graphs = None
        if recorder is not None:
            size = self._config.vision_config.image_size
            self._graphs = TowerGraphs(
                self._read, recorder, shape=(3, size, size), dtype=self.dtype
            )  # fmt: skip
            if at_once:
                self._graphs.record()

    def num_tokens(self, width: int, height: int) -> int:
        """Vision tokens of an image of this size; a LLaVA resizes every image to one size."""
        if width < 1 or height < 1:
            raise MediaError("an image needs at least one pixel")
        vision = self._config.vision_config
        patches = int(vision.image_size // vision.patch_size) ** 2
        class_token = int(self._has_class_token)
        dropped = int(self._config.vision_feature_select_strategy == "default")
        return patches + class_token - dropped

    def resident_bytes(self) -> int:
        """Bytes that the weights hold."""
        return sum(map(resident_bytes, self.parts.values()))

    def pixels(self, images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]]) -> torch.Tensor:
        """`[N, 3, S, S]` fp32 on the host, as the checkpoint's processor makes them.

        `images` are uint8 RGB `[H, W, 3]` of any size. Raises `MediaError` for anything else.
        """
        return self._processor(images)

    def encode(
        self, images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], *, batch_size: int = 32
    ) -> list[torch.Tensor]:
        """The vision tokens `[num_tokens, hidden]` of each image, `batch_size` images at a time."""
        inputs = self.encode_inputs(images, batch_size=batch_size)
        return [image.embeddings for image in inputs]

    def encode_inputs(
        self,
        images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]],
        needs: frozenset[str] = frozenset(),
        *,
        batch_size: int = 32,
    ) -> list[VisionInputs]:
        """Each image's vision tokens with those of the optional tensors that `needs` names.

        All of them belong to the encoder layer that the projector reads. Raises
        `InvalidRequestError` for what this checkpoint cannot give.
        """
        self.check_needs(needs)
        out: list[VisionInputs] = []
        for start in range(0, len(images), batch_size):
            out.extend(self.encode_pixels(self.pixels(images[start : start + batch_size]), needs))
        return out

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the tower that are run."""
        return list(self._inner.encoder.layers)

    @torch.no_grad()
    def entering(
        self, images: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], *, batch_size: int = 32
    ) -> list[torch.Tensor]:
        """What enters the first layer, `[batch, positions, width]` of `batch_size` images each."""
        out = []
        for start in range(0, len(images), batch_size):
            pixels = self._on_device(self.pixels(images[start : start + batch_size]))
            states = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
            out.append(states[0])
        return out

    def _on_device(self, pixels: torch.Tensor) -> torch.Tensor:
        """`pixels` in the dtype and on the device of the tower.

        From pinned memory: a copy of ordinary memory first waits for the stream, which a thread
        that decodes may never leave idle.
        """
        pixels = pixels.to(self.dtype)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=True)

    def encode_pixels(
        self, pixels: torch.Tensor, needs: frozenset[str] = frozenset()
    ) -> list[VisionInputs]:
        """`encode_inputs` of processed pixels `[N, 3, S, S]`, as `pixels` makes them."""
        return self._inputs(self._on_device(pixels), needs)

    @torch.no_grad()
    def _inputs(self, pixels: torch.Tensor, needs: frozenset[str]) -> list[VisionInputs]:
        read = self._graphs.run(pixels) if self._graphs is not None else None
        states = dict(zip(self._wanted, read or self._read(pixels), strict=True))
        first = 1 if self._config.vision_feature_select_strategy == "default" else 0
        features = torch.cat([states[layer][:, first:] for layer in self._layers], dim=-1)
        found: dict[str, Any] = {"embeddings": self.projector(features)}
        if "encoder_states" in needs:
            found["encoder_states"] = features
        if needs & {"encoder_keys", "cls_attention"}:
            before = self._layers[-1] - 1
            probe = AttentionProbe(self._inner.encoder.layers[before], states[before])
            if "encoder_keys" in needs:
                found["encoder_keys"] = probe.keys()[:, first:]
            if "cls_attention" in needs:
                found["cls_attention"] = probe.received(by_first=self._has_class_token)[:, first:]
        if "aligned" in needs:
            assert self._alignment is not None
            patches = self._inner.post_layernorm(states[self._layers[-1]][:, first:])
            found["aligned"] = patches @ self._alignment.mT
        side = self._config.vision_config.image_size // self._config.vision_config.patch_size
        grid = (side, side) if features.shape[1] == side * side else None
        return [
            VisionInputs(grid=grid, **{name: value[i] for name, value in found.items()})
            for i in range(len(pixels))
        ]

    @property
    def _wanted(self) -> list[int]:
        """The hidden states that anything reads: the projector, and the layer before its last."""
        return sorted({*self._layers, max(self._layers[-1] - 1, 0)})

    def _read(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Those of `_wanted`, `[N, positions, width]` each."""
        states = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [states[layer] for layer in self._wanted]

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raise `InvalidRequestError` if this checkpoint cannot give all that `needs` names."""
        if "aligned" in needs and self._alignment is None:
            raise InvalidRequestError(
                "this method compares tokens with the question in the space of a CLIP text tower, "
                "and the checkpoint has no text_tower/alignment.safetensors; "
                "query_encoder llm_embed_mean needs none",
                "pruning.params.query_encoder",
            )
        if needs & {"cls_attention", "encoder_keys"} and self._layers[-1] < 1:
            raise InvalidRequestError(
                "this method reads an encoder layer's attention; the projector reads none",
                "pruning.method",
            )

    @property
    def _has_class_token(self) -> bool:
        return bool(self._config.vision_config.model_type == "clip_vision_model")

    @property
    def _inner(self) -> Any:
        """The module that holds the encoder, in either layout of transformers."""
        return self.tower if hasattr(self.tower, "encoder") else self.tower.vision_model

    def _parameters(self) -> list[tuple[torch.Tensor, str]]:
        """Every parameter with its canonical checkpoint name."""
        return [
            (parameter, canonical_name(f"{prefix}.{name}"))
            for prefix, module in self.parts.items()
            for name, parameter in module.named_parameters()
        ]


def _llava_config(card: ModelCard) -> Any:
    from transformers import LlavaConfig

    try:
        config = LlavaConfig.from_dict(dict(card.config))
    except Exception as error:  # transformers validates with whatever type is at hand
        raise _unsupported(card, f"transformers rejects it ({type(error).__name__})") from None
    vision = config.vision_config
    if vision.model_type not in _TOWERS:
        raise _unsupported(card, f"vision tower {vision.model_type}; supported: {_TOWERS}")
    if vision.image_size % vision.patch_size:
        raise _unsupported(card, "image_size is not a multiple of patch_size")
    layers, last = _feature_layers(config), vision.num_hidden_layers
    if not layers or not all(0 <= layer <= last for layer in layers):
        raise _unsupported(card, "vision_feature_layer is outside the vision tower")
    return config


def _unsupported(card: ModelCard, why: str) -> Exception:
    return problem(f"Cannot serve the vision side of {card.name}.", f"config.json: {why[:300]}.",
                   "Use a LLaVA checkpoint with a CLIP or SigLIP vision tower.")  # fmt: skip


def _feature_layers(config: Any) -> list[int]:
    """Indices into the hidden states (0 is the embedding), negative ones counted from the end."""
    said = config.vision_feature_layer
    depth = config.vision_config.num_hidden_layers + 1
    return [
        layer + depth if layer < 0 else layer for layer in ([said] if type(said) is int else said)
    ]


def _modules(config: Any, depth: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Tower and projector without storage; layers above the ones that are read are left out."""
    from transformers import AutoModel
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    vision = config.vision_config
    vision.vision_use_head = False
    with torch.device("meta"):
        tower = AutoModel.from_config(vision, dtype=dtype)
        projector = LlavaMultiModalProjector(config).to(dtype)
    encoder = tower.get_submodule(
        "encoder" if hasattr(tower, "encoder") else "vision_model.encoder"
    )
    encoder.layers = encoder.layers[: max(depth, 1)]
    return tower, projector


def restore_position_ids(tower: nn.Module) -> None:
    """Refill the one kind of buffer, which is not part of a checkpoint."""
    for name, buffer in tower.named_buffers():
        assert name.endswith("position_ids"), f"unknown buffer {name}"
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
