"""`epd quantize`, from the command line to a checkpoint that answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from epd.config import EngineConfig
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder
from epd.roles import parse_stages
from epd_kernels import Fp8Linear
from epd_services.cli.app import app
from epd_services.stage_loader import ModelLoader

if TYPE_CHECKING:
    from pathlib import Path


def test_a_directory_of_texts_makes_a_quantised_checkpoint(tmp_path: Path) -> None:
    model = write_tiny_llava(tmp_path / "model")
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"Text number {number}, and a little more of it.")
    out = tmp_path / "out"
    arguments = ["quantize", str(model), "--scheme", "qqq", "--calib", str(texts), "-o", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("output error") == 2
    card = ModelCard.load(out)
    assert card.quantization is not None and card.quantization.scheme == "w4a8-int8"


def test_head_and_vision_on_request_reach_the_roles(tmp_path: Path) -> None:
    model, pictures, out = write_tiny_llava(tmp_path / "model"), tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    result = CliRunner().invoke(app, [
        "quantize", str(model), "--scheme", "qqq", "--head", "fp8", "--vision",
        "--calib", str(pictures), "-o", str(out),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    for named in ("vision layer 0", "vision projector", "layer   0", "vision tokens", "head"):
        assert sum(line.startswith(named) for line in result.output.splitlines()) == 1, named
    card = ModelCard.load(out)
    loader = ModelLoader(card, device="cpu", dtype=torch.float32,
                         config=EngineConfig(num_blocks=8), warm_bytes=1 << 30)  # fmt: skip
    wanted = VisionEncoder.load(card).encode([pixels])[0]
    plain = VisionEncoder.load(ModelCard.load(model)).resident_bytes()
    for stages in ("E", "D", "E"):
        loader.unload(parse_stages(stages))
        loader.load(parse_stages(stages))
        encoder, core = loader.parts.encoder, loader.parts.core
        assert (encoder is not None, core is not None) == (stages == "E", stages == "D")
        if encoder is not None:
            assert torch.equal(encoder.encode([pixels])[0], wanted)
            assert loader.resident_bytes < plain
    assert isinstance(Decoder.load(card).head, Fp8Linear)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--scheme", "w3"], "w3"),
        (["--scheme", "qqq", "--group-size", "128"], "hidden_size = 64"),
        (["--scheme", "fp8", "--calib", "nowhere"], "nowhere"),
        (["--scheme", "fp8", "--head", "int4"], "int4"),
    ],
)
def test_what_cannot_be_done_is_said_in_three_lines(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    model = write_tiny_llava(tmp_path / "model")
    out = tmp_path / "out"
    command = ["quantize", str(model), "-o", str(out), "--samples", "1", *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert named in result.output
    assert not out.exists()
