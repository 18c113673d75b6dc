"""Reading tensors of a safetensors checkpoint by name.

Hugging Face has written LLaVA under several key layouts. Names here are canonical:

    language_model.embed_tokens.weight   language_model.layers.0....   language_model.norm.weight
    lm_head.weight   vision_tower....   multi_modal_projector....
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open

from epd.models.files import problem

if TYPE_CHECKING:
    from pathlib import Path

    from epd.models.card import ModelCard

__all__ = ["Checkpoint", "canonical_name", "resolve_dtype"]

_RENAMES = (
    (re.compile(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)"), ""),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "language_model."),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)


_PLAIN = ("F64", "F32", "BF16", "F16")


def canonical_name(name: str) -> str:
    """The canonical form of a tensor name in any of the known layouts."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def resolve_dtype(device: torch.device | str, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, or the default of the device: bfloat16 on CUDA, float32 elsewhere."""
    if dtype is not None:
        return dtype
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


class Checkpoint:
    """The tensors of one card's checkpoint; a context manager, so that its files are closed."""

    def __init__(self, card: ModelCard) -> None:
        if not card.entries:
            raise problem(f"Cannot load weights of {card.name}.", "Its card was read without them.",
                          "Use random weights, or a checkpoint with safetensors.")  # fmt: skip
        self._path = card.path
        self._names = {canonical_name(name): name for name in card.entries}
        self._entries = card.entries
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self, prefix: str) -> list[str]:
        """Canonical names that begin with `prefix`, sorted."""
        return sorted(name for name in self._names if name.startswith(prefix))

    def stored_dtype(self, name: str) -> str | None:
        """How the header spells a tensor's dtype, such as `F8_E4M3`; None if it is absent."""
        return self._entries[self._names[name]].dtype if name in self._names else None

    def tensor(self, name: str, shape: tuple[int, ...] | torch.Size | None = None) -> torch.Tensor:
        """The tensor of a canonical name, on the host in its stored dtype.

        Raises `CheckpointError` when it is absent, unreadable or not of `shape`.
        """
        if name not in self._names:
            raise problem(
                f"Cannot load the model in {self._path}.",
                f"Tensor {name} is missing from its safetensors files.",
                "Download or convert the checkpoint again.",
            )
        stored = self._names[name]
        entry = self._entries[stored]
        if shape is not None and entry.shape != tuple(shape):
            raise problem(
                f"Cannot load the model in {self._path}.",
                f"Tensor {stored} is {list(entry.shape)}; config.json asks for {list(shape)}.",
                "Use the config.json that belongs to these weights.",
            )
        try:
            tensor: torch.Tensor = self._open(entry.file).get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise problem(
                f"Cannot read tensor {stored} of {entry.file}.",
                f"The file changed or is damaged ({type(error).__name__}).",
                "Download or copy the checkpoint again.",
            ) from None
        return tensor

    def fill(self, target: torch.Tensor, name: str) -> None:
        """Copy a tensor of plain floats into `target`, which has its shape, converting the dtype.

        Raises `CheckpointError` as `tensor` does, and for codes, which mean nothing by themselves.
        """
        found = self.stored_dtype(name)
        if found not in (None, *_PLAIN):
            raise problem(
                f"Cannot load the model in {self._path}.",
                f"Tensor {self._names[name]}: expected plain floats, found {found} codes.",
                "Its quantised layout is not served; use a checkpoint with this tensor in floats.",
            )
        target.copy_(self.tensor(name, target.shape))

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            handle = safe_open(str(file), framework="pt", device="cpu")
            self._files[file] = self._stack.enter_context(handle)
        return self._files[file]
