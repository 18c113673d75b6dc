"""What layers are calibrated on: hidden states of questions about pictures, or of texts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from epd.chat import ChatFormatter
from epd.errors import ConfigError
from epd.images import RGBArray, rgb_array
from epd.models.checkpoint import Checkpoint
from epd.models.files import problem
from epd.quantize.block import Sequences

if TYPE_CHECKING:
    from epd.models.card import ModelCard
    from epd.models.vision import VisionEncoder

__all__ = ["Calibration", "Sample", "digest", "embed", "from_directory", "from_scenes"]

SCENE_SEED = 7
"""Which held-out set calibration draws from; accuracy is measured on others."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_QUESTION = "Describe the picture."
_EMBED = "language_model.embed_tokens.weight"
_MAX_TEXT = 1 << 16


@dataclass(frozen=True, slots=True)
class Sample:
    """A question about `images` (or a text, without), and the answer that follows it."""

    question: str
    images: tuple[RGBArray, ...] = ()
    answer: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Hidden states fp32 `[T, hidden]` that enter the first layer, and how they are packed."""

    hidden: torch.Tensor
    sequences: Sequences


def from_scenes(count: int) -> list[Sample]:
    """`count` questions of the built-in model's world, drawn apart from those that test it."""
    from epd.demo.examples import held_out

    return [
        Sample(example.question, tuple(map(rgb_array, example.images)), example.answer)
        for example in held_out(count, SCENE_SEED)
    ]


def from_directory(path: Path, count: int) -> list[Sample]:
    """The first `count` samples of a directory, by name.

    Each picture is a sample; a text file of the same stem is its question. Text files without a
    picture are samples of their own. Raises `ConfigError` when there are none.
    """
    if not path.is_dir():
        raise ConfigError(f"Cannot calibrate on {path}.\nIt is no directory.\n"
                          "Name a directory of pictures and texts, or 'scenes'.")  # fmt: skip
    files = sorted(file for file in path.iterdir() if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in _PICTURES]
    shown = {file.stem for file in pictures}
    texts = [file for file in files if file.suffix == ".txt" and file.stem not in shown]
    chosen = [*pictures, *texts][:count]
    if not chosen:
        raise ConfigError(f"Cannot calibrate on {path}.\nIt holds neither pictures nor .txt files."
                          "\nPut some there, or calibrate on 'scenes'.")  # fmt: skip
    return [_sample(file) for file in chosen]


def _sample(file: Path) -> Sample:
    if file.suffix == ".txt":
        return Sample(_text(file))
    question = file.with_suffix(".txt")
    return Sample(_text(question) if question.is_file() else _QUESTION, (rgb_array(file),))


def _text(file: Path) -> str:
    return file.read_bytes()[:_MAX_TEXT].decode("utf-8", errors="replace").strip()


def digest(samples: list[Sample]) -> str:
    """Hex sha256 of questions, answers and pixels."""
    found = hashlib.sha256()
    for sample in samples:
        shapes = [image.shape for image in sample.images]
        found.update(repr((sample.question, sample.answer, shapes)).encode())
        for image in sample.images:
            found.update(image.tobytes())
    return found.hexdigest()


def embed(
    card: ModelCard, samples: list[Sample], vision: VisionEncoder | None = None
) -> Calibration:
    """`samples` as hidden states, their pictures seen by `vision` or else the card's own encoder.

    Raises `CheckpointError` naming the sample that is not finite.
    """
    from epd.models.registry import load_vision

    formatter = ChatFormatter(card)
    if vision is None and any(sample.images for sample in samples):
        vision = load_vision(card, dtype=torch.float32)
    with Checkpoint(card) as checkpoint:
        name = _EMBED if _EMBED in checkpoint else "lm_head.weight"
        table = checkpoint.tensor(name).float()
    rows = []
    for number, sample in enumerate(samples):
        tokens = vision.encode(list(sample.images)) if vision is not None and sample.images else []
        hidden = _hidden(_token_ids(formatter, sample), card.image_token_id, table, tokens)
        hidden = hidden[: card.max_position]
        if not bool(hidden.isfinite().all()):
            raise problem(
                "Cannot calibrate.",
                f"Hidden states of sample {number}: expected finite numbers, found NaN.",
                "Repair the checkpoint's embedding or vision weights, or take another sample.",
            )
        rows.append(hidden)
    return Calibration(torch.cat(rows), Sequences(tuple(len(row) for row in rows)))


def _token_ids(formatter: ChatFormatter, sample: Sample) -> list[int]:
    parts = [{"type": "image"} for _ in sample.images]
    content = [*parts, {"type": "text", "text": sample.question}]
    token_ids = formatter.tokenize([{"role": "user", "content": content}])
    answer: list[int] = formatter.tokenizer.encode(sample.answer, add_special_tokens=False).ids
    return token_ids + answer


def _hidden(
    token_ids: list[int], image_id: int | None, table: torch.Tensor, images: list[torch.Tensor]
) -> torch.Tensor:
    """Embeddings with each placeholder replaced by the tokens of its image."""
    left = iter(images)
    parts, start = [], 0
    ids = torch.tensor(token_ids)
    for place in [i for i, token in enumerate(token_ids) if token == image_id]:
        parts += [functional.embedding(ids[start:place], table), next(left).float()]
        start = place + 1
    return torch.cat([*parts, functional.embedding(ids[start:], table)])
