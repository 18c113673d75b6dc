"""`epd quantize`, from the command line to a checkpoint that answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from epd.models.card import ModelCard
from epd.models.tiny import write_tiny_llava
from epd_services.cli.app import app

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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--scheme", "w3"], "w3"),
        (["--scheme", "qqq", "--group-size", "128"], "hidden_size = 64"),
        (["--scheme", "fp8", "--calib", "nowhere"], "nowhere"),
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
