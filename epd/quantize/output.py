"""What a quantised checkpoint holds beside its layers: head, vision side, the rest, its facts."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from epd.models.checkpoint import canonical_name
from epd.models.files import TensorEntry, read_header
from epd.models.quantization import MARKS
from epd.quantize.head import EMBED, HEAD
from epd.quantize.workspace import layer_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from epd.models.card import ModelCard
    from epd.quantize.options import QuantizeOptions
    from epd.quantize.workspace import Workspace

__all__ = ["HEAD_FILE", "LAYERS", "VISION_FILE", "complete", "respelled", "spelling"]

HEAD_FILE, VISION_FILE = "head.safetensors", "vision.safetensors"
LAYERS = "language_model.layers."
_REST = "unquantized.safetensors"
_CHUNK = 1 << 24
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


def spelling(card: ModelCard) -> dict[str, str]:
    """The names of the source's tensors, by their canonical names."""
    return {canonical_name(name): name for name in card.entries}


def respelled(card: ModelCard, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` of quantised layers under the prefixes that the source spells."""
    stored = spelling(card)
    named = {}
    for name, tensor in tensors.items():
        prefix, _, suffix = name.rpartition(".")
        source = stored.get(f"{prefix}.weight", f"{prefix}.weight")
        named[f"{source.removesuffix('weight')}{suffix}"] = tensor
    return named


def complete(card: ModelCard, workspace: Workspace, options: QuantizeOptions) -> None:
    """Everything but what is quantised: the other tensors, the index, and the files beside them."""
    _copy_files(card.path, workspace.model)
    files = [layer_file(index) for index in range(card.text.num_layers)]
    files += [name for name in (HEAD_FILE, VISION_FILE) if (workspace.model / name).is_file()]
    made = {name: file for file in files for name in read_header(workspace.model / file)}
    _copy_tensors(_rest(card, made), workspace.model / _REST)
    weight_map = {**made, **dict.fromkeys(read_header(workspace.model / _REST), _REST)}
    workspace.write_json("model.safetensors.index.json",
                         {"metadata": {}, "weight_map": weight_map})  # fmt: skip
    section = {
        "quant_method": "epd", "format_version": options.format_version,
        "scheme": options.stored_scheme, "bits": 8 if options.scheme == "fp8" else 4,
        "group_size": options.group_size, "kv": options.kv, "head": options.head,
        "vision": options.vision, "rounding": "half-even", "made_with": options.described(),
    }  # fmt: skip
    config = json.loads((card.path / "config.json").read_text(encoding="utf-8"))
    config.setdefault("dtype", card.dtype)
    workspace.write_json("config.json", {**config, "quantization_config": section})


def _rest(card: ModelCard, made: Mapping[str, str]) -> dict[str, TensorEntry]:
    """What is copied: all that neither belongs to a decoder layer nor is replaced by codes."""
    prefixes = {name.rpartition(".")[0] for name in made if name.endswith(MARKS)}
    rest = {
        name: entry for name, entry in card.entries.items()
        if not canonical_name(name).startswith(LAYERS)
        and name not in {f"{prefix}.weight" for prefix in prefixes}
    }  # fmt: skip
    stored = spelling(card)
    if HEAD in stored and stored[HEAD] not in rest and EMBED not in stored:
        rest[EMBED] = card.entries[stored[HEAD]]  # tied, and stored once, as the head
    return rest


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
