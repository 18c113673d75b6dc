"""The decoder against transformers' LLaVA: logits, greedy tokens, batching, loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlavaForConditionalGeneration
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from epd.errors import CheckpointError
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint
from epd.models.context import AttentionBatch, ForwardContext
from epd.models.decoder import Decoder, DecoderConfig
from epd.models.rope import inverse_frequencies
from epd.models.text_config import RopeConfig
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder

BLOCK = 4
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-gqa": {},
    "llama-mha-tied": {"num_kv_heads": 4, "tied": True},
    "llama-mqa-bias": {"num_kv_heads": 1, "qkv_bias": True},
    "llama-rope-500k-siglip": {"rope_theta": 5e5, "vision": "siglip", "select": "full"},
    "llama3-rope": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama-linear-rope": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "mistral-wide-heads": {"text": "mistral", "head_dim": 32},
    "qwen2-tied": {"text": "qwen2", "tied": True, "rope_theta": 1e6},
    "qwen3-odd-width": {"text": "qwen3", "head_dim": 24, "num_layers": 3},
    "llama-two-feature-layers": {"feature_layer": [-2, 1], "center_crop": True},
}


class Pool:
    """The simplest paged cache: sequence s owns a shuffled run of blocks of its own."""

    def __init__(self, config: DecoderConfig, num_seqs: int, blocks_each: int = 32) -> None:
        count = num_seqs * blocks_each
        shape = (config.num_layers, 2, count, BLOCK, config.num_kv_heads, config.head_dim)
        self.cache = torch.full(shape, float("nan"))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(num_seqs, blocks_each).to(torch.int32)
        self.lengths = [0] * num_seqs
        self.num_layers = config.num_layers

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache[index, 0], self.cache[index, 1]

    def context(self, counts: dict[int, int]) -> tuple[ForwardContext, torch.Tensor]:
        """Context and positions of a step in which sequence s adds `counts[s]` tokens."""
        slots, positions, ends = [], [], [0]
        for s, count in counts.items():
            here = torch.arange(self.lengths[s], self.lengths[s] + count)
            slots.append(self.tables[s, here // BLOCK].long() * BLOCK + here % BLOCK)
            positions.append(here)
            ends.append(ends[-1] + count)
            self.lengths[s] += count
        lengths = [self.lengths[s] for s in counts]
        batch = AttentionBatch(
            cu_seqlens_q=torch.tensor(ends, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=self.tables[list(counts)], slot_mapping=torch.cat(slots),
            max_seqlen_q=max(counts.values()), max_seqlen_k=max(lengths),
        )  # fmt: skip
        context = ForwardContext(groups=(batch,), layer_group=(0,) * self.num_layers, kv=self)
        return context, torch.cat(positions)


def images(seed: int, count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (20 + 9 * i, 37, 3), np.uint8) for i in range(count)]


def expand(card: ModelCard, prompt: list[int], features: list[torch.Tensor]) -> list[int]:
    counts = iter(features)
    return [
        token
        for token_id in prompt
        for token in [token_id] * (len(next(counts)) if token_id == card.image_token_id else 1)
    ]


def embed(decoder: Decoder, ids: list[int], image_id: int, features: list[torch.Tensor]) -> Any:
    tokens = torch.tensor(ids)
    hidden = decoder.embed(tokens)
    if features:
        hidden[tokens == image_id] = torch.cat(features)
    return hidden


def greedy(
    decoder: Decoder, hiddens: list[torch.Tensor], steps: int
) -> tuple[list[list[int]], Any]:
    """Token ids and logits of each step for a batch that prefills together, then decodes."""
    pool = Pool(decoder.config, len(hiddens))
    context, positions = pool.context({s: len(h) for s, h in enumerate(hiddens)})
    hidden = decoder(torch.cat(hiddens), positions, context)
    last = context.groups[0].cu_seqlens_q[1:].long() - 1
    logits = [decoder.logits(hidden[last])]
    tokens = [logits[-1].argmax(-1)]
    for _ in range(steps - 1):
        context, positions = pool.context(dict.fromkeys(range(len(hiddens)), 1))
        hidden = decoder(decoder.embed(tokens[-1]), positions, context)
        logits.append(decoder.logits(hidden))
        tokens.append(logits[-1].argmax(-1))
    return torch.stack(tokens, 1).tolist(), torch.stack(logits, 1)


def prompts(image_id: int) -> list[tuple[list[int], int]]:
    """Prompt ids and how many images they hold: none, one, and two apart."""
    generator = np.random.default_rng(5)
    text = [1, *generator.integers(5, 260, 30).tolist()]
    return [
        (text[:9], 0),
        ([*text[:4], image_id, *text[4:20]], 1),
        ([text[0], image_id, *text[7:19], image_id, *text[20:]], 2),
    ]


def reference(path: Path) -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_greedy_tokens_equal_transformers(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write_tiny_llava(tmp_path, seed=3, **options)
    card, model = ModelCard.load(path), reference(path)
    decoder, vision = Decoder.load(card), VisionEncoder.load(card)
    assert card.image_token_id is not None
    hiddens, expected, scores = [], [], []
    for prompt, count in prompts(card.image_token_id):
        features = vision.encode(images(count, count))
        ids = expand(card, prompt, features)
        hiddens.append(embed(decoder, ids, card.image_token_id, features))
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if count:
            inputs["pixel_values"] = vision.pixels(images(count, count))
        answer = model.generate(
            **inputs, attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
            max_new_tokens=32, min_new_tokens=32, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        expected.append(answer.sequences[0, len(ids) :].tolist())
        scores.append(torch.cat(answer.logits))
    tokens, logits = greedy_without_eos(decoder, hiddens, card)
    assert tokens == expected
    torch.testing.assert_close(logits, torch.stack(scores), rtol=1e-4, atol=1e-4)


def greedy_without_eos(
    decoder: Decoder, hiddens: list[torch.Tensor], card: ModelCard
) -> tuple[list[list[int]], torch.Tensor]:
    """`greedy` with eos never chosen, as `min_new_tokens` asks of transformers."""
    plain = decoder.logits
    raw: list[torch.Tensor] = []

    def masked(hidden: torch.Tensor) -> torch.Tensor:
        raw.append(plain(hidden))
        scores = raw[-1].clone()
        scores[:, list(card.eos_token_ids)] = -float("inf")
        return scores

    decoder.logits = masked  # type: ignore[method-assign]
    tokens, _ = greedy(decoder, hiddens, 32)
    return tokens, torch.stack(raw, 1)


def test_chunked_prefill_and_layer_groups_change_nothing(tmp_path: Path) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path, num_layers=4))
    decoder = Decoder.load(card)
    hidden = decoder.embed(torch.arange(5, 42))
    pool = Pool(decoder.config, 1)
    context, positions = pool.context({0: 37})
    whole = decoder(hidden, positions, context)

    pool, parts = Pool(decoder.config, 1), []
    for start in range(0, 37, 7):
        chunk = hidden[start : start + 7]
        context, positions = pool.context({0: len(chunk)})
        for first, stop in ((0, 1), (1, 1), (1, 3), (3, 4)):
            chunk = decoder.run_layers(chunk, positions, context, first, stop)
        parts.append(decoder.final_norm(chunk))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_each_layer_uses_the_tables_of_its_group(tmp_path: Path) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path, num_layers=2))
    decoder = Decoder.load(card)
    pool = Pool(decoder.config, 2)
    hidden = decoder.embed(torch.arange(5, 16))
    first, positions = pool.context({0: 11})
    second, _ = pool.context({1: 11})
    mixed = ForwardContext(groups=(*first.groups, *second.groups), layer_group=(0, 1), kv=pool)
    decoder(hidden, positions, mixed)
    written = ~pool.cache[:, 0].isnan().flatten(2).any(-1)
    owner = {int(block): s for s, table in enumerate(pool.tables) for block in table}
    for layer, blocks in enumerate(written):
        assert {owner[int(b)] for b in blocks.nonzero()} == {layer}


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 3.0}, LLAMA3])
def test_rope_frequencies_equal_transformers(scaling: dict[str, Any]) -> None:
    rope = {"rope_theta": 1e4, **scaling}
    theirs, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
        LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=dict(rope)), "cpu"
    )
    ours = DecoderConfig.from_text_config({"hidden_size": 256, "num_attention_heads": 2,
                                           "rope_parameters": rope})  # fmt: skip
    torch.testing.assert_close(inverse_frequencies(ours.rope, 128), theirs, rtol=1e-6, atol=0)


def test_old_and_new_spellings_of_rope_agree() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    config = DecoderConfig.from_text_config(old)
    assert config == DecoderConfig.from_text_config(new)
    assert config.rope == RopeConfig(
        theta=5e5, type="linear", factor=4.0, original_max_position=2048
    )


def test_defaults_equal_transformers() -> None:
    from transformers import AutoConfig

    for family in ("llama", "mistral", "qwen2", "qwen3"):
        theirs = AutoConfig.for_model(family)
        ours = DecoderConfig.from_text_config({"model_type": family, "sliding_window": None})
        assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers) == (
            theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size,
            theirs.num_hidden_layers,
        )  # fmt: skip
        assert (ours.num_heads, ours.num_kv_heads, ours.max_position, ours.rms_norm_eps) == (
            theirs.num_attention_heads, theirs.num_key_value_heads,
            theirs.max_position_embeddings, theirs.rms_norm_eps,
        )  # fmt: skip
        assert ours.head_dim == getattr(theirs, "head_dim", 128)
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3"),
        ({"model_type": "mistral"}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer type"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"num_attention_heads": 12, "num_key_value_heads": 5}, "heads"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as raised:
        DecoderConfig.from_text_config(change)
    assert len(str(raised.value).splitlines()) == 3


def test_a_sliding_window_longer_than_the_context_is_not_in_use() -> None:
    raw = {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}
    assert DecoderConfig.from_text_config(raw).num_kv_heads == 8


def test_random_is_seeded_and_of_the_asked_shape() -> None:
    config = DecoderConfig.from_text_config({
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 500,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    })  # fmt: skip
    one, same, other = (Decoder.random(config, "cpu", torch.bfloat16, seed) for seed in (1, 1, 2))
    assert one.dtype == torch.bfloat16
    assert one.device.type == "cpu"
    assert torch.equal(one.embedding, same.embedding)
    assert not torch.equal(one.embedding, other.embedding)
    values = dict(one.named_parameters())
    assert values["layers.1.attention.qkv_proj.weight"].float().std() == pytest.approx(
        0.02, rel=0.1
    )
    assert bool((values["layers.0.input_norm.weight"] == 1).all())
    per_layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert one.resident_bytes() == 2 * (2 * 500 * 64 + 2 * per_layer + 64)
    big = Decoder(replace(config, hidden_size=4096, num_layers=32), "meta", torch.bfloat16)
    assert big.embedding.is_meta


def test_decoder_loads_no_vision_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path))
    read: list[str] = []
    tensor = Checkpoint.tensor

    def noted(self: Checkpoint, name: str, shape: Any = None) -> torch.Tensor:
        read.append(name)
        return tensor(self, name, shape)

    monkeypatch.setattr(Checkpoint, "tensor", noted)
    Decoder.load(card)
    assert read
    assert not any("vision" in name or "projector" in name for name in read)
    read.clear()
    VisionEncoder.load(card)
    assert read
    assert not any("language" in name or "lm_head" in name for name in read)
