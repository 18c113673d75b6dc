"""A tiny random LLaVA checkpoint: complete, on disk, made in a fraction of a second.

For tests, documentation and trying the services out: it knows nothing, but every path through
the code is the real one. Weights are scaled so that answers depend on every token and image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

__all__ = ["write_tiny_llava", "write_tiny_text_tower"]

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_BOS, _EOS, _IMAGE = 1, 2, 4
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' if m['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_tiny_llava(
    directory: str | Path,
    *,
    seed: int = 0,
    text: str = "llama",
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    hidden_size: int = 64,
    tied: bool = False,
    qkv_bias: bool = False,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    max_position: int = 2048,
    vision: str = "clip",
    image_size: int = 28,
    patch_size: int = 7,
    vision_layers: int = 3,
    feature_layer: int | list[int] = -2,
    select: str = "default",
    center_crop: bool = False,
    shard_bytes: int | None = None,
) -> Path:
    """`directory`, now holding a complete checkpoint of a LLaVA of the given shape.

    `text` is llama, mistral, qwen2 or qwen3; `vision` is clip or siglip; `qkv_bias` applies to
    llama (qwen2 always has it). The tokenizer is one token per byte and five special tokens.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(directory, max_position)
    rope = {"rope_type": "default", "rope_theta": rope_theta, **(rope_scaling or {})}
    text_config = {
        "model_type": text, "vocab_size": vocab_size, "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim, "max_position_embeddings": max_position, "rope_parameters": rope,
        "tie_word_embeddings": tied, "bos_token_id": _BOS, "eos_token_id": _EOS,
        "pad_token_id": 0, "attention_bias": qkv_bias, "sliding_window": None,
    }  # fmt: skip
    vision_config = {
        "model_type": f"{vision}_vision_model", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": vision_layers, "num_attention_heads": 4, "image_size": image_size,
        "patch_size": patch_size, "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(
        text_config=text_config, vision_config=vision_config, image_token_index=_IMAGE,
        vision_feature_layer=feature_layer, vision_feature_select_strategy=select,
        tie_word_embeddings=tied, image_seq_length=(image_size // patch_size) ** 2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    _scatter(model, seed)
    with _silenced():
        model.save_pretrained(directory, max_shard_size=shard_bytes or "5GB")
    _write_processor(directory, image_size, patch_size, vision, select, center_crop)
    return directory


def write_tiny_text_tower(
    directory: str | Path, *, seed: int = 0, end_token: int = 3, max_position: int = 24,
    trained_on_patches: bool = True,
) -> Path:  # fmt: skip
    """`directory/text_tower`, a random CLIP text tower aligned with the tiny checkpoint there.

    `max_position` is the longest segment. transformers pools at an end token other than 2 where it
    first stands, and with 2, as early CLIP configurations say, at the largest id.
    """
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    width = config["vision_config"]["hidden_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=config["text_config"]["vocab_size"], hidden_size=32,
                intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=max_position, projection_dim=16, pad_token_id=0,
                bos_token_id=_BOS, eos_token_id=end_token,
            )
        )  # fmt: skip
    _scatter(tower, seed)
    with _silenced():
        tower.save_pretrained(directory / "text_tower")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, width, generator=generator) * width**-0.5
    alignment = {"visual_projection.weight": weight}
    if trained_on_patches:
        alignment |= {"patch_logit_scale": torch.tensor(1.0), "patch_logit_bias": torch.zeros(())}
    save_file(alignment, directory / "text_tower" / "alignment.safetensors")
    return directory / "text_tower"


@contextmanager
def _silenced() -> Iterator[None]:
    """No progress bar of transformers inside; its setting is put back afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _scatter(model: torch.nn.Module, seed: int) -> None:
    """Seeded weights of unit gain, with biases and norms that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(dict(model.named_parameters()).items()):
            if parameter.ndim > 1 and "embed" not in name.rsplit(".", 2)[-2]:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, 1.4 * fan_in**-0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, 0.3, generator=generator)


def _write_tokenizer(directory: Path, max_position: int) -> int:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", _BOS)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "image")}
    _write(directory / "tokenizer_config.json", {
        **names, "bos_token": "<s>", "eos_token": "</s>", "model_max_length": max_position,
        "tokenizer_class": "TokenizersBackend", "processor_class": "LlavaProcessor",
        "clean_up_tokenization_spaces": False, "padding_side": "left",
    })  # fmt: skip
    (directory / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return len(vocab)


def _write_processor(
    directory: Path, image_size: int, patch_size: int, vision: str, select: str, center_crop: bool
) -> None:
    square = {"height": image_size, "width": image_size}
    image_processor: dict[str, Any] = {
        "image_processor_type": f"{'CLIP' if vision == 'clip' else 'Siglip'}ImageProcessor",
        "do_resize": True, "size": {"shortest_edge": image_size} if center_crop else square,
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "do_convert_rgb": True,
    }  # fmt: skip
    if vision == "clip":
        image_processor |= {"do_center_crop": center_crop, "crop_size": square}
    _write(directory / "processor_config.json", {
        "image_processor": image_processor, "image_token": "<image>", "patch_size": patch_size,
        "num_additional_image_tokens": 1 if vision == "clip" else 0,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": select,
    })  # fmt: skip


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
