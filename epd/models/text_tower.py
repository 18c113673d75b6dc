"""The CLIP text tower of a checkpoint: questions as vectors beside aligned vision tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from epd.chat import load_tokenizer
from epd.models.alignment import tower_directory
from epd.models.files import problem, read_json
from epd.models.vision import restore_position_ids

if TYPE_CHECKING:
    from pathlib import Path

    from epd.models.card import ModelCard

__all__ = ["TextTower"]

_MOST_SEGMENTS = 16


class TextTower:
    """Text in, pooled vectors out. `load` gives None for a checkpoint without a tower."""

    def __init__(
        self, directory: Path, tokenizer: Any, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self._directory = directory
        self._config = _config(directory)
        self._tokenizer = tokenizer
        self._frame = self._framed()
        self.device = torch.device(device)
        with torch.device("meta"):
            from transformers import CLIPTextModelWithProjection

            self.model: Any = CLIPTextModelWithProjection(self._config).to(dtype)
        self.model.to_empty(device=device).requires_grad_(False).eval()
        restore_position_ids(self.model)
        self._fill()

    @classmethod
    def load(
        cls, card: ModelCard, device: torch.device | str, dtype: torch.dtype
    ) -> TextTower | None:
        """The tower in `text_tower/` with its own tokenizer, or the checkpoint's if it has none.

        Raises `CheckpointError` when it is damaged.
        """
        directory = tower_directory(card.path)
        if directory is None:
            return None
        own = (directory / "tokenizer.json").is_file()
        return cls(directory, load_tokenizer(directory if own else card.path), device, dtype)

    def resident_bytes(self) -> int:
        """Bytes that the weights hold."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @torch.no_grad()
    def encode(self, text: str) -> torch.Tensor:
        """Vectors `[M, C]` of the segments of `text`, each as long as the tower takes.

        Every segment begins and ends as a text of its own: the tower pools at the end token. No
        text gives M = 0; of a very long one the first segments count.
        """
        start, end = self._frame
        size = self._config.max_position_embeddings - 2
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids[: size * _MOST_SEGMENTS]
        if not ids:
            return torch.empty(0, self._config.projection_dim, device=self.device)
        segments = [[start, *ids[i : i + size], end] for i in range(0, len(ids), size)]
        longest = max(map(len, segments))
        # attention is causal: what stands after the end token changes nothing before it
        rows = [segment + [0] * (longest - len(segment)) for segment in segments]
        pooled: torch.Tensor = self.model(
            input_ids=torch.tensor(rows, device=self.device)
        ).text_embeds
        return pooled

    def _framed(self) -> tuple[int, int]:
        """Begin and end token: what the tokenizer puts around a text, or else what config says."""
        ids = self._tokenizer.encode("").ids
        start, end = (
            ids if len(ids) == 2 else (self._config.bos_token_id, self._config.eos_token_id)
        )
        if not all(type(i) is int and 0 <= i < self._config.vocab_size for i in (start, end)):
            raise _unusable(self._directory, "Its begin and end tokens are not in its vocabulary.")
        return start, end

    def _fill(self) -> None:
        try:
            stored = load_file(self._directory / "model.safetensors")
        except (SafetensorError, OSError) as error:
            raise _unusable(
                self._directory, f"model.safetensors is damaged ({type(error).__name__})."
            ) from None
        for name, parameter in self.model.named_parameters():
            if name not in stored or stored[name].shape != parameter.shape:
                raise _unusable(self._directory, f"Tensor {name} is missing or has another shape.")
            parameter.copy_(stored[name])


def _config(directory: Path) -> Any:
    from transformers import CLIPTextConfig

    try:
        config = CLIPTextConfig.from_dict(read_json(directory, "config.json", required=True))
    except (TypeError, ValueError, AttributeError) as error:
        raise _unusable(directory, f"transformers rejects it ({type(error).__name__}).") from None
    if config.max_position_embeddings < 3:
        raise _unusable(directory, "It takes no text.")
    return config


def _unusable(directory: Path, why: str) -> Exception:
    return problem(
        f"Cannot load the text tower in {directory}.",
        why,
        "Use a CLIPTextModelWithProjection directory, or remove text_tower/.",
    )
