"""Quantising a checkpoint: layer after layer, in the memory of one, into a directory of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from epd.errors import ConfigError
from epd.kv.formats import KV_PLAIN
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint
from epd.models.files import problem
from epd.quantize.block import Block, Sequences
from epd.quantize.calibration import digest, embed, from_directory, from_scenes
from epd.quantize.head import quantize_head
from epd.quantize.layer import quantize_layer
from epd.quantize.output import HEAD_FILE, LAYERS, VISION_FILE, complete, respelled, spelling
from epd.quantize.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from epd.quantize.calibration import Sample
    from epd.quantize.options import QuantizeOptions

__all__ = ["REPORT", "calibration_samples", "quantize_model"]

REPORT = "quantization_report.json"


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
    """The report, once the quantised checkpoint is at `out`.

    What is not quantised is a byte-exact copy. Started again after a kill, it goes on after the
    last finished layer. `advance` is told how many layers are done and what is happening. Raises
    `CheckpointError` or `ConfigError`: `out` is untouched then.
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
    plan = {
        "model": card.revision, "encoder": card.encoder_revision, "options": options.described(),
        "calibration": digest(samples), "format_version": options.format_version,
    }  # fmt: skip
    with Workspace(out).opened(plan) as workspace:
        told = _calibrate(card, workspace, options, samples, advance)
        _layers(card, workspace, options, Sequences(tuple(told["lengths"])), advance)
        report = {
            **plan, "tokens": sum(told["lengths"]), "layers": workspace.reports(),
            "head": _head(card, workspace) if options.head == "fp8" else None,
            "vision": told["vision"],
        }  # fmt: skip
        complete(card, workspace, options)
        workspace.write_json(REPORT, report)
        workspace.publish()
    return report


def _calibrate(
    card: ModelCard, workspace: Workspace, options: QuantizeOptions, samples: list[Sample],
    advance: Callable[[int, str], None],
) -> dict[str, Any]:  # fmt: skip
    """Lengths of the sequences, whose hidden states are in the workspace, and the vision report.

    The vision side comes first: what it makes of the pictures is what the layers will see.
    """
    if (known := workspace.calibration()) is not None:
        return known
    advance(0, "calibration")
    vision = report = None
    if options.vision:
        from epd.models.registry import load_vision
        from epd.quantize.vision import quantize_vision

        vision = load_vision(card, dtype=torch.float32)
        images = [image for sample in samples for image in sample.images]
        tensors, report = quantize_vision(vision, images, options, lambda note: advance(0, note))
        workspace.save_tensors(VISION_FILE, respelled(card, tensors))
    calibration = embed(card, samples, vision)
    if options.kv != KV_PLAIN:
        workspace.save_sample(calibration.hidden[: calibration.sequences.lengths[0]])
    told = {"lengths": list(calibration.sequences.lengths), "vision": report}
    workspace.save_calibration(calibration.hidden, told)
    return told


def _layers(
    card: ModelCard, workspace: Workspace, options: QuantizeOptions, sequences: Sequences,
    advance: Callable[[int, str], None],
) -> None:  # fmt: skip
    """Quantise the layers that are not done yet."""
    count, start = card.text.num_layers, workspace.finished()
    if start == count:
        return
    stored, hidden = spelling(card), workspace.hidden()
    with Checkpoint(card) as checkpoint:
        for index in range(start, count):
            advance(index, f"layer {index}")
            block = Block.load(checkpoint, card.text, index)
            result = quantize_layer(block, hidden, sequences, options)
            hidden = result.hidden
            finite = math.isfinite(result.report["output_error"])
            if not finite or not bool(hidden.isfinite().all()):
                raise problem(
                    f"Cannot quantise layer {index}.",
                    "What leaves it on the calibration samples: expected finite numbers, found "
                    "NaN or infinity.",
                    "Repair the checkpoint's weights, or take other samples.",
                )
            prefix = _stored_prefix(stored, index)
            tensors = {prefix + name: tensor for name, tensor in result.tensors.items()}
            workspace.save_layer(index, tensors, result.report, hidden)
    advance(count, "")


def _stored_prefix(stored: dict[str, str], index: int) -> str:
    """How the source spells the prefix of a layer's tensors."""
    name = "input_layernorm.weight"
    return stored[f"{LAYERS}{index}.{name}"].removesuffix(name)


def _head(card: ModelCard, workspace: Workspace) -> dict[str, Any]:
    """Quantise the head; its report."""
    with Checkpoint(card) as checkpoint:
        tensors, report = quantize_head(checkpoint, card.text, workspace.hidden())
    named = {f"lm_head.{suffix}": tensor for suffix, tensor in tensors.items()}
    workspace.save_tensors(HEAD_FILE, respelled(card, named))
    return report
