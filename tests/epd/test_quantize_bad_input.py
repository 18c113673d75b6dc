"""What cannot be quantised or served quantised: a typed error, and nothing left behind.

Layouts, declarations and options have their refusals in their own tests.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from epd.errors import CheckpointError, ConfigError
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint
from epd.models.decoder import Decoder
from epd.models.quantized_layers import HEAD, install_layers, quantized_paths
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder
from epd.quantize.calibration import Sample
from epd.quantize.options import QuantizeOptions
from epd.quantize.run import quantize_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_SAMPLES = [Sample(f"what is number {n}?", (), "a thing") for n in range(3)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llava(tmp_path / "model")


def _change(directory: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        told = json.loads(index.read_text())
        kept = {name: f for name, f in told["weight_map"].items() if f != file}
        told["weight_map"] = {**kept, **dict.fromkeys(tensors, file)}
        index.write_text(json.dumps(told))


def _quantize(model: Path, out: Path, scheme: str = "w4a16", **more: Any) -> Path:
    options = QuantizeOptions(scheme=scheme, steps=2, nearest=True, **more)
    quantize_model(model, out, options, samples=_SAMPLES)
    return out


def test_a_layer_in_no_known_layout_is_named(model: Path, tmp_path: Path) -> None:
    out = _quantize(model, tmp_path / "out")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".o_proj.weight_" in n]:
            tensors[name.replace("weight_", "blob_")] = tensors.pop(name)

    _change(out, "layer-00001.safetensors", rename)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.weight is missing"):
        Decoder.load(ModelCard.load(out))


def test_a_group_size_that_does_not_divide_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="128 inputs do not divide hidden_size = 64"):
        _quantize(model, tmp_path / "out", group_size=128)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("scheme", ["w4a16", "qqq", "fireq", "fp8"])
def test_states_that_overflow_in_a_layer_are_named_and_nothing_is_left(
    model: Path, tmp_path: Path, scheme: str
) -> None:
    """Every weight is finite; what they make of the samples is not."""

    def inflate(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("mlp.up_proj", "mlp.down_proj"):
            key = next(n for n in tensors if n.endswith(f"layers.0.{name}.weight"))
            tensors[key] *= 1e25

    _change(model, "model.safetensors", inflate)
    options = QuantizeOptions(scheme=scheme, steps=2)
    with pytest.raises(CheckpointError) as raised:
        quantize_model(model, tmp_path / "out", options, samples=_SAMPLES)
    assert "layer" in str(raised.value)
    assert str(raised.value).count("\n") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_source_cut_short_is_named_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*\n.*ends inside tensor"):
        _quantize(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("file", ["head", "vision", "unquantized"])
def test_every_file_of_ours_cut_short_is_named(tmp_path: Path, file: str) -> None:
    pictured = Sample("what?", (torch.zeros(28, 28, 3, dtype=torch.uint8).numpy(),))
    options = QuantizeOptions(scheme="fp8", vision=True)
    model = write_tiny_llava(tmp_path / "model", num_layers=1)
    quantize_model(model, tmp_path / "out", options, samples=[pictured])
    cut = tmp_path / "out" / f"{file}.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{file}\.safetensors.*\n.*ends inside tensor"):
        ModelCard.load(tmp_path / "out")


class _Device:
    """As much of a decoder as is asked before a layer is built."""

    device = torch.device("cuda")
    dtype = torch.bfloat16


@pytest.mark.parametrize(
    ("scheme", "head", "capability", "named"),
    [
        ("w4a16", "bf16", (7, 5), r"is 7\.5; .*q_proj needs 8\.0 or later for its codes"),
        ("qqq", "bf16", (7, 0), r"is 7\.0; .*q_proj needs 8\.0"),
        ("qqq", "fp8", (8, 0), r"is 8\.0; lm_head needs 8\.9 or later for FP8"),
        ("fireq", "bf16", (8, 6), r"is 8\.6; .*q_proj needs 8\.9 or later for FP8"),
        ("fp8", "bf16", (8, 0), r"is 8\.0; .*q_proj needs 8\.9 or later for FP8"),
    ],
)
def test_a_gpu_that_cannot_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    scheme: str, head: str, capability: tuple[int, int], named: str,
) -> None:  # fmt: skip
    card = ModelCard.load(_quantize(model, tmp_path / "out", scheme, head=head))
    assert card.quantization is not None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with Checkpoint(card) as checkpoint:
        paths = quantized_paths(checkpoint, card.text, card.quantization)
        assert (HEAD in paths) == (head == "fp8")
        with pytest.raises(CheckpointError, match=named):
            install_layers(_Device(), paths)  # type: ignore[arg-type]


def test_a_gpu_that_cannot_encode_in_fp8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictured = Sample("what?", (torch.zeros(28, 28, 3, dtype=torch.uint8).numpy(),))
    model = write_tiny_llava(tmp_path / "model", num_layers=1)
    options = QuantizeOptions(scheme="fp8", vision=True)
    quantize_model(model, tmp_path / "out", options, samples=[pictured])
    card = ModelCard.load(tmp_path / "out")
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda self, **_: self)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(CheckpointError, match=r"vision_tower.*needs 8\.9 or later for FP8"):
        VisionEncoder.load(card, "cuda")
