"""Quantising a checkpoint: layer after layer, in the memory of one, into a directory of its own."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch

from epd.errors import ConfigError
from epd.kv.formats import KV_PLAIN
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint, canonical_name
from epd.models.files import TensorEntry, read_header
from epd.models.quantization import FORMAT_VERSION
from epd.quantize.block import Block
from epd.quantize.calibration import embed, from_directory, from_scenes
from epd.quantize.layer import quantize_layer
from epd.quantize.workspace import Workspace, digest, layer_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from epd.quantize.calibration import Calibration, Sample
    from epd.quantize.options import QuantizeOptions

__all__ = ["REPORT", "calibration_samples", "quantize_model"]

REPORT = "quantization_report.json"
_REST = "unquantized.safetensors"
_LAYERS = "language_model.layers."
_CHUNK = 1 << 24
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


def calibration_samples(source: str | Path, count: int) -> list[Sample]:
    """`count` samples of the built-in world (`scenes`) or of a directory."""
    from pathlib import Path

    if count < 1:
        raise ConfigError("Cannot calibrate on nothing.\nThe number of samples is below 1.\n"
                          "Give a positive number.")  # fmt: skip
    return from_scenes(count) if source == "scenes" else from_directory(Path(source), count)


@torch.inference_mode()
def quantize_model(
    model: str | Path,
    out: Path,
    options: QuantizeOptions,
    *,
    samples: list[Sample],
    advance: Callable[[int, str], None] = lambda done, note: None,
) -> dict[str, Any]:
    """The report, once the quantised checkpoint is at `out`; its vision side is a byte-exact copy.

    Started again after a kill, it goes on after the last finished layer. `advance` is told the
    how many layers are done. Raises `CheckpointError` or `ConfigError`: `out` is untouched.
    """
    card = ModelCard.load(model)
    if card.quantization is not None:
        raise ConfigError(f"Cannot quantise {card.name}.\nIts weights are quantised already.\n"
                          "Start from the checkpoint with plain float weights.")  # fmt: skip
    out = out.expanduser().resolve()
    if out.is_relative_to(card.path):
        raise ConfigError(f"Cannot write to {out}.\nIt lies inside the model that is read.\n"
                          "Choose a place outside of it.")  # fmt: skip
    options = options.resolved(card.text)
    advance(0, "calibration")
    calibration = embed(card, samples)
    plan = {
        "model": card.revision, "options": options.described(),
        "calibration": digest(calibration.hidden), "format_version": FORMAT_VERSION,
    }  # fmt: skip
    with Workspace(out).opened(plan) as workspace:
        _layers(card, workspace, options, calibration, advance)
        report = {**plan, "tokens": len(calibration.hidden), "layers": workspace.reports()}
        _complete(card, workspace, options, report)
        if options.kv != KV_PLAIN:
            workspace.save_sample(calibration.hidden[: calibration.sequences.lengths[0]])
        workspace.publish()
    return report


def _layers(
    card: ModelCard, workspace: Workspace, options: QuantizeOptions, calibration: Calibration,
    advance: Callable[[int, str], None],
) -> None:  # fmt: skip
    """Quantise the layers that are not done yet."""
    count, start = card.text.num_layers, workspace.finished()
    stored = {canonical_name(name): name for name in card.entries}
    if start == count:
        return
    hidden = workspace.hidden(start) if start else calibration.hidden
    assert hidden is not None, "a finished layer leaves what enters the next"
    with Checkpoint(card) as checkpoint:
        for index in range(start, count):
            advance(index, f"layer {index}")
            block = Block.load(checkpoint, card.text, index)
            result = quantize_layer(block, hidden, calibration.sequences, options)
            hidden = result.hidden
            prefix = _stored_prefix(stored, index)
            tensors = {prefix + name: tensor for name, tensor in result.tensors.items()}
            workspace.save_layer(index, tensors, result.report, hidden)
    advance(count, "")


def _stored_prefix(stored: dict[str, str], index: int) -> str:
    """How the source spells the prefix of a layer's tensors."""
    name = "input_layernorm.weight"
    return stored[f"{_LAYERS}{index}.{name}"].removesuffix(name)


def _complete(
    card: ModelCard, workspace: Workspace, options: QuantizeOptions, report: dict[str, Any]
) -> None:
    """Everything but the layers: the other tensors, the index, and the files beside them."""
    _copy_files(card.path, workspace.model)
    rest = {
        name: entry
        for name, entry in card.entries.items()
        if not canonical_name(name).startswith(_LAYERS)
    }
    _copy_tensors(rest, workspace.model / _REST)
    files = [layer_file(index) for index in range(card.text.num_layers)] + [_REST]
    weight_map = {n: file for file in files for n in read_header(workspace.model / file)}
    workspace.write_json("model.safetensors.index.json",
                         {"metadata": {}, "weight_map": weight_map})  # fmt: skip
    section = {
        "quant_method": "epd", "format_version": FORMAT_VERSION, "scheme": options.stored_scheme,
        "bits": 8 if options.scheme == "fp8" else 4, "group_size": options.group_size,
        "kv": options.kv, "rounding": "half-even", "made_with": options.described(),
    }  # fmt: skip
    config = json.loads((card.path / "config.json").read_text(encoding="utf-8"))
    config.setdefault("dtype", card.dtype)
    workspace.write_json("config.json", {**config, "quantization_config": section})
    workspace.write_json(REPORT, report)


def _copy_files(source: Path, target: Path) -> None:
    """Tokenizer, processor, template and subdirectories; not the weights that are rewritten."""
    for path in source.iterdir():
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _copy_tensors(entries: dict[str, TensorEntry], target: Path) -> None:
    """One safetensors file with the bytes of `entries`, never more than a chunk in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        size = entry.end - entry.start
        header[name] = {"dtype": entry.dtype, "shape": entry.shape,
                        "data_offsets": [end, end + size]}  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = target.with_suffix(".writing")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            with entry.file.open("rb") as source:
                source.seek(entry.start)
                left = entry.end - entry.start
                while left and (chunk := source.read(min(_CHUNK, left))):
                    file.write(chunk)
                    left -= len(chunk)
    os.replace(unfinished, target)
