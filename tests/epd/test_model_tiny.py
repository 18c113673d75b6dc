"""The tiny fake checkpoint: repeatable, complete, quick, and without side effects."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from epd.chat import ChatFormatter
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder


def test_equal_seeds_give_equal_models(tmp_path: Path) -> None:
    cards = [
        ModelCard.load(write_tiny_llava(tmp_path / str(i), seed=seed))
        for i, seed in enumerate((5, 5, 6))
    ]
    assert cards[0].revision == cards[1].revision != cards[2].revision
    assert cards[0].encoder_revision == cards[1].encoder_revision != cards[2].encoder_revision


def test_it_is_quick_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    write_tiny_llava(tmp_path / "warm")
    state = torch.get_rng_state()
    started = time.perf_counter()
    write_tiny_llava(tmp_path / "timed", text="qwen2", num_layers=4)
    assert time.perf_counter() - started < 1
    assert torch.equal(torch.get_rng_state(), state)


def test_shards_hold_the_same_weights(tmp_path: Path) -> None:
    whole = ModelCard.load(write_tiny_llava(tmp_path / "whole"))
    parts = ModelCard.load(write_tiny_llava(tmp_path / "parts", shard_bytes=100_000))
    assert len({entry.file for entry in parts.entries.values()}) > 1
    ours, theirs = Decoder.load(whole).state_dict(), Decoder.load(parts).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_part_reads_it(tmp_path: Path) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path, image_size=42))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}
    ids = ChatFormatter(card).tokenize([message])
    assert ids.count(card.image_token_id or -1) == 1
    assert max(ids) < card.vocab_size
    assert VisionEncoder.load(card).num_tokens(1, 1) == 36
