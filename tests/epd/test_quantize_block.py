"""A layer as plain matrices: it is transformers' layer, and folding leaves its function alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from epd.errors import CheckpointError
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint
from epd.models.tiny import write_tiny_llava
from epd.quantize.block import POINTS, Block, Sequences, hadamard
from epd.quantize.layer import quantize_layer
from epd.quantize.options import QuantizeOptions
from epd.quantize.smoothing import candidates, search

if TYPE_CHECKING:
    from pathlib import Path

_SHAPES = {
    "llama": {}, "qwen2": {"num_kv_heads": 1}, "qwen3": {"head_dim": 32},
    "biased": {"text": "llama", "qkv_bias": True, "num_kv_heads": 4},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(_SHAPES))
def card(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    shape = {"text": request.param, **_SHAPES[request.param]}
    return ModelCard.load(write_tiny_llava(tmp_path_factory.mktemp("tiny"), **shape))


def _block(card: ModelCard, index: int = 0) -> Block:
    with Checkpoint(card) as checkpoint:
        return Block.load(checkpoint, card.text, index)


def _hidden(card: ModelCard, seed: int = 0) -> tuple[torch.Tensor, Sequences]:
    sequences = Sequences((9, 1, 14))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, card.hidden_size, generator=generator), sequences


def test_a_block_computes_what_transformers_computes(card: ModelCard) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(card.path, dtype=torch.float32)
    hidden, sequences = _hidden(card)
    got = _block(card).forward(hidden, sequences)
    for start, stop in sequences.bounds():
        with torch.no_grad():
            states = model.model.language_model(
                inputs_embeds=hidden[None, start:stop], output_hidden_states=True
            ).hidden_states
        torch.testing.assert_close(got[start:stop], states[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("point", list(POINTS))
def test_scaling_inputs_keeps_the_function(card: ModelCard, point: str) -> None:
    block, (hidden, sequences) = _block(card), _hidden(card)
    scaled = block.copy()
    width = block.weight(point).shape[1]
    factors = torch.rand(width, generator=torch.Generator().manual_seed(1)) * 4 + 0.25
    factors = block.tie(point, factors)
    scaled.scale_inputs(point, factors)
    torch.testing.assert_close(
        scaled.forward(hidden, sequences), block.forward(hidden, sequences), rtol=1e-4, atol=1e-4
    )
    before, after = (b.inputs(hidden, sequences)[point] for b in (block, scaled))
    torch.testing.assert_close(after * factors, before, rtol=1e-4, atol=1e-4)


def test_rotating_values_keeps_the_function_and_spreads_an_outlier(card: ModelCard) -> None:
    block, (hidden, sequences) = _block(card), _hidden(card)
    name = "self_attn.v_proj.weight"
    block.tensors[name] = block.tensors[name].clone()
    block.tensors[name][3] *= 30
    rotated = block.copy()
    rotated.rotate_values()
    torch.testing.assert_close(
        rotated.forward(hidden, sequences), block.forward(hidden, sequences), rtol=1e-3, atol=1e-3
    )
    before, after = (b.inputs(hidden, sequences)["o"].abs().max() for b in (block, rotated))
    assert after < 0.6 * before


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_a_hadamard_matrix_is_orthogonal_with_equal_entries(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


@pytest.mark.parametrize("family", ["awq", "qqq", "fireq"])
def test_every_family_begins_with_doing_nothing_and_is_positive(family: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(32, 16, generator=generator) for _ in range(2))
    x[:, 4] *= 50
    x[:, 5] = 0
    tried = list(candidates(family, x, weight, 8))
    assert torch.equal(tried[0][1], torch.ones(16))
    assert all(bool((f > 0).all() and f.isfinite().all()) for _, f in tried)
    if family == "qqq":
        threshold, factors = tried[4]
        expected = (x.abs().amax(0) / threshold).clamp(min=1)
        torch.testing.assert_close(factors, expected)
        assert float((x / factors).abs().max()) <= threshold * 1.0001


def test_a_search_takes_the_least_error() -> None:
    family = iter([(p, torch.full((2,), p)) for p in (1.0, 3.0, 2.0)])
    choice = search(family, lambda f: f, lambda f: abs(float(f[0]) - 2.2))
    assert (choice.parameter, round(choice.before, 3), round(choice.after, 3)) == (2.0, 1.2, 0.2)


@pytest.mark.parametrize("scheme", ["w4a16", "qqq", "fireq"])
def test_smoothing_and_compensation_beat_rounding_to_nearest(card: ModelCard, scheme: str) -> None:
    generator = torch.Generator().manual_seed(3)
    basis = torch.randn(16, card.hidden_size, generator=generator)
    hidden = torch.randn(240, 16, generator=generator) @ basis
    hidden[:, 5] *= 10
    options = QuantizeOptions(scheme=scheme, steps=6).resolved(card.text)
    result = quantize_layer(_block(card), hidden, Sequences((80, 80, 80)), options)
    assert result.report["output_error"] < 0.8 * result.report["output_error_nearest"]
    for point in result.report["smoothing"].values():
        assert point["after"] <= point["before"]


def test_nearest_is_its_own_baseline(card: ModelCard) -> None:
    hidden, sequences = _hidden(card)
    options = QuantizeOptions(scheme="qqq", nearest=True).resolved(card.text)
    report = quantize_layer(_block(card), hidden, sequences, options).report
    assert report["output_error"] == report["output_error_nearest"]
    assert all(layer["before"] == layer["after"] for layer in report["layers"].values())


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = write_tiny_llava(tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN"):
        _block(ModelCard.load(directory), 1)
