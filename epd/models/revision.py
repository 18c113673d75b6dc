"""Digests that let two processes prove they serve the same model, without torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from epd.models.files import TensorEntry, read_header
from epd.models.quantization import MARKS, Quantization

__all__ = ["encoder_revision", "model_revision"]

_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_TOWER_FILES = ("text_tower/config.json", "text_tower/tokenizer.json")
_ALIGNMENT_FILES = ("text_tower/alignment.safetensors",)
_TOWER_WEIGHTS = "text_tower/model.safetensors"
_VISION_KEYS = (
    "model_type", "vision_config", "vision_feature_layer", "vision_feature_select_strategy",
    "projector_hidden_act", "multimodal_projector_bias",
)  # fmt: skip
_MARKS = tuple(f".{mark}" for mark in MARKS)
_SAMPLE = 4096
_CHUNK = 1 << 22


def model_revision(directory: Path, entries: Mapping[str, TensorEntry]) -> str:
    """Hex sha256 over configuration, tokenizer and processor files and every tensor's header.

    Of each tensor the first 4 KiB enter as well, so a retrained model of equal shape differs.
    """
    digest = hashlib.sha256()
    _add_files(digest, directory, (*_FILES, *_TOWER_FILES, *_ALIGNMENT_FILES))
    _add_tensors(digest, entries, sample=_SAMPLE)
    if (directory / _TOWER_WEIGHTS).is_file():
        _add_tensors(digest, read_header(directory / _TOWER_WEIGHTS), sample=_SAMPLE)
    return digest.hexdigest()


def encoder_revision(
    directory: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry],
    quantization: Quantization | None = None,
) -> str:  # fmt: skip
    """Hex sha256 over everything an image's vision tokens depend on: all vision weights too.

    It names entries of the shared token cache, so here every byte counts, and how the kernels round
    what enters a quantised vision layer.
    """
    digest = hashlib.sha256()
    facts = {key: config.get(key) for key in _VISION_KEYS}
    facts["hidden_size"] = (config.get("text_config") or {}).get("hidden_size")
    vision = {k: v for k, v in entries.items() if "vision_tower." in k or "projector." in k}
    if quantization is not None and any(name.endswith(_MARKS) for name in vision):
        facts["quantization"] = (quantization.scheme, quantization.zero_offset)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    _add_files(digest, directory, (*_PROCESSOR_FILES, *_ALIGNMENT_FILES))
    _add_tensors(digest, vision, sample=None)
    return digest.hexdigest()


def _add_files(digest: Any, directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = directory / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name}:{len(content)}:".encode() + content)


def _add_tensors(digest: Any, entries: Mapping[str, TensorEntry], *, sample: int | None) -> None:
    files: dict[Path, int] = {}
    try:
        for name in sorted(entries):
            entry = entries[name]
            digest.update(f"{name}:{entry.dtype}:{entry.shape}:{entry.end - entry.start}:".encode())
            if entry.file not in files:
                files[entry.file] = os.open(entry.file, os.O_RDONLY)
            end = entry.end if sample is None else min(entry.end, entry.start + sample)
            for start in range(entry.start, end, _CHUNK):
                digest.update(os.pread(files[entry.file], min(_CHUNK, end - start), start))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
