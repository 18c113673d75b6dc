"""Scaling of keys: it changes no attention, it tames outliers, and a checkpoint carries it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from epd.config import EngineConfig
from epd.core import EngineCore
from epd.errors import CheckpointError, ConfigError
from epd.kv import gate
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint
from epd.models.decoder import Decoder
from epd.models.layers import DecoderLayer
from epd.models.tiny import write_tiny_llava
from epd.quantize.block import Block, Sequences
from epd.quantize.calibration import Sample
from epd.quantize.keys import scale_keys
from epd.quantize.options import QuantizeOptions
from epd.quantize.run import quantize_model
from epd_kernels import KVFormat

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {}, "biased": {"text": "llama", "qkv_bias": True, "num_kv_heads": 1},
    "qk-norm": {"text": "qwen3", "head_dim": 32, "num_heads": 4, "num_kv_heads": 2},
}  # fmt: skip
SEQUENCES = Sequences((40, 24))


@pytest.fixture(params=list(SHAPES))
def card(request: pytest.FixtureRequest, tmp_path: Path) -> ModelCard:
    return ModelCard.load(write_tiny_llava(tmp_path / "tiny", **SHAPES[request.param]))


def _block(card: ModelCard, loud: float = 1.0) -> Block:
    """A layer with a loud pair of key channels, and one loud channel without its partner."""
    with Checkpoint(card) as checkpoint:
        block = Block.load(checkpoint, card.text, 0)
    half = card.text.head_dim // 2
    for place, factor in ((1, loud), (1 + half, loud), (2, 2 * loud)):
        if card.text.qk_norm:
            block.tensors["self_attn.k_norm.weight"][place] *= factor
        else:
            block.tensors["self_attn.k_proj.weight"][place :: card.text.head_dim] *= factor
    return block


def _hidden(card: ModelCard) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(sum(SEQUENCES.lengths), card.hidden_size, generator=rng)


def test_scaling_keeps_the_function(card: ModelCard) -> None:
    block, hidden = _block(card, loud=20.0), _hidden(card)
    before = block.forward(hidden, SEQUENCES)
    scaled = block.copy()
    chosen = scale_keys(scaled, scaled.norm("qkv", hidden), SEQUENCES, KVFormat.INT4)
    assert chosen["gamma"] > 0 or chosen["top"] > 0
    torch.testing.assert_close(scaled.forward(hidden, SEQUENCES), before, rtol=1e-4, atol=1e-4)


def test_loud_channels_cost_less_once_scaled(card: ModelCard) -> None:
    block, hidden = _block(card, loud=20.0), _hidden(card)
    x = block.norm("qkv", hidden)
    chosen = scale_keys(block, x, SEQUENCES, KVFormat.INT4)
    assert chosen["after"] < 0.7 * chosen["before"]
    again = scale_keys(block.copy(), x, SEQUENCES, KVFormat.INT4)
    # what was merged stays merged; without online factors only those are missing
    assert card.text.qk_norm or again["before"] <= chosen["before"]


def test_with_nothing_to_gain_nothing_is_lost(card: ModelCard) -> None:
    block = _block(card)
    chosen = scale_keys(block, block.norm("qkv", _hidden(card)), SEQUENCES, KVFormat.INT4)
    assert chosen["after"] <= chosen["before"]


def _quantize(card: ModelCard, out: Path, **options: Any) -> dict[str, Any]:
    samples = [Sample(f"what is number {i}?", (), "a thing") for i in range(4)]
    given = QuantizeOptions(scheme="fireq", steps=3, group_size=0, **options)
    return quantize_model(card.path, out, given, samples=samples)


def test_a_checkpoint_carries_format_factors_and_sample(card: ModelCard, tmp_path: Path) -> None:
    report = _quantize(card, tmp_path / "out", kv="int4")
    made = ModelCard.load(tmp_path / "out")
    assert made.quantization is not None
    assert made.quantization.kv == "int4"
    decoder = Decoder.load(made)
    for layer, told in zip(decoder.layers, report["layers"], strict=True):
        assert isinstance(layer, DecoderLayer)
        online = layer.attention.kv_factors is not None
        assert online == (card.text.qk_norm or told["kv"]["top"] > 0)
    sample = load_file(tmp_path / "out" / gate.SAMPLE_FILE)["hidden"]
    assert sample.shape[1] == card.hidden_size
    for setting, kinds in (("auto", {"int4"}), ("fp8", {"fp8"}), ("bf16", {"bf16"})):
        config = EngineConfig(num_blocks=4, kv=setting)
        core = EngineCore(decoder, made, config=config, device="cpu")
        assert set(core.facts.kv_formats) == kinds
    plain = _quantize(card, tmp_path / "plain", nearest=True)
    assert all("kv" not in layer for layer in plain["layers"])
    assert not (tmp_path / "plain" / gate.SAMPLE_FILE).exists()
    assert Decoder.load(ModelCard.load(tmp_path / "plain")).kv_format == "bf16"


def test_bad_factors_and_formats_are_refused(tmp_path: Path) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path / "tiny", **SHAPES["qk-norm"]))
    out = tmp_path / "out"
    _quantize(card, out, kv="int4")
    (file,) = out.glob("layer-00000.safetensors")
    stored = load_file(file)
    (name,) = [name for name in stored if name.endswith("kv_factors")]
    for bad in (-stored[name], stored[name] * float("nan"), stored[name][:, :4].contiguous()):
        save_file({**stored, name: bad}, file)
        with pytest.raises(CheckpointError, match="kv_factors"):
            Decoder.load(ModelCard.load(out))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv"] = "int3"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="kv: int3"):
        ModelCard.load(out)
    with pytest.raises(ConfigError, match="Unknown KV format 'int3'"):
        QuantizeOptions(scheme="fireq", kv="int3")
