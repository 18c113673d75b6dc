"""The shapes of LLaVA-1.5-7B, from its published config.json, which leaves most defaults out."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from epd.models.card import ModelCard
from epd.models.context import AttentionBatch, ForwardContext
from epd.models.decoder import Decoder
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder

CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
        "torch_dtype": "float16", "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}  # fmt: skip
DECODER_PARAMETERS = 2 * 32064 * 4096 + 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return ModelCard.load(tmp_path, weights=False)


def test_sizes_are_those_of_the_published_model(card: ModelCard) -> None:
    assert (card.image_token_id, card.eos_token_ids, card.max_position) == (32000, (2,), 4096)
    assert card.dtype == "float16"
    decoder = Decoder(card.text, "meta", torch.bfloat16)
    assert decoder.resident_bytes() == 2 * DECODER_PARAMETERS
    vision = VisionEncoder(card, "meta", torch.bfloat16)
    assert vision.num_tokens(640, 480) == 576


@pytest.mark.gpu
def test_random_weights_are_made_on_the_device(card: ModelCard) -> None:
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    decoder = Decoder.random(card.text, "cuda")
    torch.cuda.synchronize()
    assert time.perf_counter() - started < 30
    assert decoder.dtype == torch.bfloat16
    assert torch.cuda.max_memory_allocated() < 1.2 * decoder.resident_bytes() + (1 << 30)
    vision = VisionEncoder.random(card, "cuda")
    inputs = vision.encode_pixels(torch.zeros(2, 3, 336, 336))
    assert [image.embeddings.shape for image in inputs] == [(576, 4096)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_a_gpu_computes_what_the_cpu_computes(tmp_path: Path, text: str) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path, text=text, head_dim=64))
    ids, outputs = torch.arange(5, 42), []
    for device in ("cpu", "cuda"):
        decoder = Decoder.load(card, device, torch.float32)
        shape = (decoder.config.num_layers, 2, 8, 16, decoder.config.num_kv_heads, 64)
        caches = torch.zeros(shape, device=device)
        batch = AttentionBatch(
            cu_seqlens_q=torch.tensor([0, 37], dtype=torch.int32, device=device),
            seq_lens=torch.tensor([37], dtype=torch.int32, device=device),
            block_tables=torch.arange(8, dtype=torch.int32, device=device)[None],
            slot_mapping=torch.arange(37, device=device), max_seqlen_q=37, max_seqlen_k=37,
        )  # fmt: skip

        class Caches:
            tensors = caches

            def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
                return self.tensors[index, 0], self.tensors[index, 1]

        context = ForwardContext(groups=(batch,), layer_group=(0,) * len(caches), kv=Caches())
        hidden = decoder.embed(ids.to(device))
        out = decoder(hidden, torch.arange(37, device=device), context)
        outputs.append(decoder.logits(out).cpu())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-3, atol=2e-3)
