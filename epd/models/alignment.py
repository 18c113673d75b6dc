"""The text tower beside a checkpoint, as far as the vision side and the card need to know it.

`text_tower/` holds a CLIP text model with projection; `alignment.safetensors` in it holds
`visual_projection.weight` [C, E], which takes `post_layernorm` of the encoder's patch states to the
tower's space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from epd.models.files import problem, read_header

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from epd.models.card import ModelCard

__all__ = ["TOWER_FILES", "read_alignment", "relevance_sign", "tower_directory"]

_DIRECTORY, _ALIGNMENT = "text_tower", "alignment.safetensors"
_WEIGHT, _PATCH_SCALE = "visual_projection.weight", "patch_logit_scale"
TOWER_FILES = ("config.json", "model.safetensors", _ALIGNMENT)


def tower_directory(path: Path) -> Path | None:
    """The complete text tower of a checkpoint directory, if it has one."""
    directory = path / _DIRECTORY
    return directory if all((directory / name).is_file() for name in TOWER_FILES) else None


def read_alignment(card: ModelCard, width: int) -> torch.Tensor | None:
    """The projection [C, `width`] of patch states to the tower's space; None without a tower.

    Raises `CheckpointError` when it is damaged or belongs to another encoder.
    """
    directory = tower_directory(card.path)
    if directory is None:
        return None
    from safetensors import safe_open

    file = directory / _ALIGNMENT
    entry = read_header(file).get(_WEIGHT)
    if entry is None or len(entry.shape) != 2 or entry.shape[1] != width:
        raise problem(
            f"Cannot use the text tower of {card.name}.",
            f"{_ALIGNMENT} has no {_WEIGHT} of {width} columns.",
            "Use the text tower that belongs to this vision tower, or remove text_tower/.",
        )
    with safe_open(str(file), framework="pt", device="cpu") as tensors:
        weight: torch.Tensor = tensors.get_tensor(_WEIGHT)
    return weight


def relevance_sign(path: Path) -> int:
    """+1 where the tower was trained on patches (a `patch_logit_scale` says so), else −1: patch
    similarities of a CLIP trained on whole images come out inverted.
    """
    directory = tower_directory(path)
    trained = directory is not None and _PATCH_SCALE in read_header(directory / _ALIGNMENT)
    return 1 if trained else -1
