"""Questions as vectors, and what pruning reads inside the encoder, against transformers."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextModelWithProjection, LlavaForConditionalGeneration

from epd.chat import load_tokenizer
from epd.demo import CHECKPOINT
from epd.errors import CheckpointError, InvalidRequestError
from epd.models.alignment import read_alignment, relevance_sign
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.query import QueryEncoder
from epd.models.text_tower import TextTower
from epd.models.tiny import write_tiny_llava, write_tiny_text_tower
from epd.models.vision import VisionEncoder

ALL = frozenset({"aligned", "cls_attention", "encoder_keys", "encoder_states"})


def tower(path: Path) -> TextTower:
    loaded = TextTower.load(ModelCard.load(path), "cpu", torch.float32)
    assert loaded is not None
    return loaded


def reference(path: Path, ids: list[int]) -> torch.Tensor:
    model = CLIPTextModelWithProjection.from_pretrained(path / "text_tower", dtype=torch.float32)
    with torch.no_grad():
        embedded: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).text_embeds
    return embedded[0]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_llava(tmp_path, seed=3)
    write_tiny_text_tower(tmp_path, seed=5)
    return tmp_path


@pytest.mark.parametrize("end", [2, 3])
def test_segments_are_texts_of_their_own(tmp_path: Path, end: int) -> None:
    write_tiny_llava(tmp_path, seed=3)
    write_tiny_text_tower(tmp_path, end_token=end, max_position=10)
    text = "what is left of it?"
    ids = load_tokenizer(tmp_path).encode(text, add_special_tokens=False).ids
    assert len(ids) == 19
    vectors = tower(tmp_path).encode(text)
    expected = [reference(tmp_path, [1, *ids[i : i + 8], end]) for i in (0, 8, 16)]
    torch.testing.assert_close(vectors, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-2)


def test_no_text_gives_no_vectors_and_a_book_gives_sixteen(tiny: Path) -> None:
    assert tower(tiny).encode("").shape == (0, 16)
    assert tower(tiny).encode("long " * 5000).shape == (16, 16)


def test_the_towers_own_tokenizer_wins(tiny: Path) -> None:
    from tokenizers import Tokenizer, processors

    write_tiny_text_tower(tiny, end_token=2)
    own = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    own.post_processor = processors.TemplateProcessing(
        single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", 2)]
    )
    own.save(str(tiny / "text_tower" / "tokenizer.json"))
    ids = own.encode("hello", add_special_tokens=False).ids
    vectors = tower(tiny).encode("hello")
    torch.testing.assert_close(vectors[0], reference(tiny, [0, *ids, 2]), rtol=1e-5, atol=1e-5)


def test_the_demo_tower() -> None:
    question = "What color is the circle?"
    loaded = tower(CHECKPOINT)
    ids = load_tokenizer(CHECKPOINT).encode(question).ids
    config = loaded.model.config
    expected = reference(CHECKPOINT, [*ids, config.eos_token_id])
    torch.testing.assert_close(loaded.encode(question)[0], expected, rtol=1e-4, atol=1e-4)
    assert relevance_sign(CHECKPOINT) == 1


def test_a_checkpoint_without_a_tower(tmp_path: Path) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path))
    assert TextTower.load(card, "cpu", torch.float32) is None
    assert read_alignment(card, 32) is None
    queries = QueryEncoder(card, Decoder.load(card, "cpu", torch.float32))
    with pytest.raises(InvalidRequestError, match="llm_embed_mean") as caught:
        queries.encode("clip_text", "hi")
    assert caught.value.param == "pruning.params.query_encoder"
    with pytest.raises(InvalidRequestError, match="text_tower") as caught:
        VisionEncoder.load(card).encode_inputs([np.zeros((9, 9, 3), np.uint8)], ALL)
    assert caught.value.param == "pruning.params.query_encoder"


@pytest.mark.parametrize("file", ["model.safetensors", "alignment.safetensors", "config.json"])
def test_a_damaged_tower_is_told(tiny: Path, file: str) -> None:
    target = tiny / "text_tower" / file
    target.write_bytes(target.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="text_tower"):
        card = ModelCard.load(tiny)
        VisionEncoder.load(card)
        tower(tiny)


def test_the_tower_of_another_encoder_is_refused(tiny: Path) -> None:
    shutil.copy(CHECKPOINT / "text_tower" / "alignment.safetensors", tiny / "text_tower")
    with pytest.raises(CheckpointError, match="32 columns"):
        VisionEncoder.load(ModelCard.load(tiny))


def test_revisions_cover_the_tower(tiny: Path) -> None:
    first = ModelCard.load(tiny)
    write_tiny_text_tower(tiny, seed=6)
    second = ModelCard.load(tiny)
    assert first.encoder_revision != second.encoder_revision
    assert first.revision != second.revision
    write_tiny_text_tower(tiny, seed=6, trained_on_patches=False)
    assert (relevance_sign(tiny), ModelCard.load(tiny).image_tokens) == (-1, 16)


def test_the_mean_of_the_llms_embeddings(tiny: Path) -> None:
    card = ModelCard.load(tiny)
    decoder = Decoder.load(card, "cpu", torch.float32)
    ids = load_tokenizer(tiny).encode("what is it?", add_special_tokens=False).ids
    model = LlavaForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    expected = model.get_input_embeddings()(torch.tensor(ids)).mean(0, keepdim=True)
    queries = QueryEncoder(card, decoder)
    vector = queries.encode("llm_embed_mean", "what is it?")
    torch.testing.assert_close(vector, expected.detach())
    assert queries.encode("llm_embed_mean", "what is it?") is vector
    assert queries.encode("llm_embed_mean", "").shape == (0, 64)
    torch.testing.assert_close(queries.encode("clip_text", "hi"), tower(tiny).encode("hi"))


# inside the encoder

CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip-full-last": {"feature_layer": -1, "select": "full"},
    "clip-list": {"feature_layer": [1, -2]},
    "siglip-full": {"vision": "siglip", "feature_layer": -2, "select": "full"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_lies_inside_the_encoder_equals_transformers(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    write_tiny_llava(tmp_path, seed=4, vision_layers=4, **options)
    write_tiny_text_tower(tmp_path, seed=5)
    encoder = VisionEncoder.load(ModelCard.load(tmp_path))
    model = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    vision = model.model.vision_tower
    inner = vision if hasattr(vision, "encoder") else vision.vision_model
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (30, 40, 3), np.uint8) for _ in range(3)]
    layers = options.get("feature_layer", -2)
    layers = layers if isinstance(layers, list) else [layers]
    index = layers[-1] % 5
    first = int(options.get("select", "default") == "default")
    weight = read_alignment(ModelCard.load(tmp_path), 32)
    assert weight is not None
    with torch.no_grad():
        out = vision(encoder.pixels(images), output_hidden_states=True, output_attentions=True)
        states, attention = out.hidden_states, out.attentions[index - 1].mean(1)
        layer = inner.encoder.layers[index - 1]
        keys = layer.self_attn.k_proj(layer.layer_norm1(states[index - 1]))
        patches = inner.post_layernorm(states[index][:, first:]) @ weight.T
    received = attention[:, 0] if options.get("vision") != "siglip" else attention.mean(1)
    expected = {
        "encoder_states": torch.cat([states[i][:, first:] for i in layers], -1),
        "encoder_keys": keys.unflatten(-1, (4, 8)).mean(2)[:, first:],
        "cls_attention": received[:, first:], "aligned": patches,
    }  # fmt: skip
    plain = encoder.encode(images)
    for i, found in enumerate(encoder.encode_inputs(images, ALL, batch_size=2)):
        torch.testing.assert_close(found.embeddings, plain[i], rtol=1e-5, atol=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(
                getattr(found, name), value[i], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
            )
    only = encoder.encode_inputs(images[:1], frozenset({"aligned"}))[0]
    assert only.aligned is not None
    assert only.cls_attention is only.encoder_keys is only.encoder_states is None
    assert only.grid == (None if options.get("select") == "full" and "vision" not in options
                         else (4, 4))  # fmt: skip


def test_threads_may_share_an_encoder(tiny: Path) -> None:
    encoder = VisionEncoder.load(ModelCard.load(tiny))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (30, 40, 3), np.uint8) for _ in range(4)]
    expected = [encoder.encode_inputs([image], ALL)[0].cls_attention for image in images]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            found = list(threads.map(lambda image: encoder.encode_inputs([image], ALL)[0], images))
            for one, value in zip(found, expected, strict=True):
                torch.testing.assert_close(one.cls_attention, value)
