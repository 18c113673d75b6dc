"""Builds the demo model from transformers' own classes; writes it as a Hugging Face directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from epd.demo.wording import ANSWERS, MULTI, PROPERTIES, SINGLE, prompts_of
from epd.demo.world import IMAGE_SIDE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# the statistics CLIP's processors use, which LLaVA runtimes assume
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
SPECIAL_TOKENS = ("<pad>", "<s>", "<unk>", "</s>", "<image>")
PAD, BOS, UNK, EOS, IMAGE = range(len(SPECIAL_TOKENS))
VOCABULARY = 1024
MAX_LENGTH = 2048
PROJECTION = 128
SHARD_SIZE = "14MB"

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ 'USER: ' }}
{%- if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}
{{ '<image>\\n' }}
{%- endfor -%}
{%- endif -%}
{{ text_of(message['content']) + ' ' }}
{%- elif message['role'] == 'assistant' -%}
{{ 'ASSISTANT: ' + text_of(message['content']) + '</s>' }}
{%- else -%}
{{ text_of(message['content']) + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Widths and depths. Heads are 32 wide; the decoder has half as many KV heads as heads."""

    patch: int = 14
    vision_width: int = 256
    vision_layers: int = 7
    decoder_width: int = 256
    decoder_layers: int = 7
    decoder_inner: int = 704
    text_width: int = 192
    text_layers: int = 2

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return IMAGE_SIDE // self.patch

    @property
    def image_tokens(self) -> int:
        """Vision tokens of one image."""
        return self.grid**2


SIZES = {
    "demo": Size(),
    "tiny": Size(28, 64, 2, 64, 2, 128, 64, 1),
}


def corpus() -> Iterator[str]:
    """Every prompt and answer, as the tokenizer meets them."""
    yield "USER: <image>\nASSISTANT:"
    for kind in SINGLE + MULTI:
        for row in prompts_of(kind):
            for prompt in row:
                yield f"USER: \n{prompt} ASSISTANT:"
    yield from PROPERTIES
    for answer in ANSWERS:
        yield from [f" {answer}"] * 40
    yield from [" a red circle, a blue square and the text.", " an orange star", " no"] * 50


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer of the templates; digits and printed characters stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_llava(size: Size, vocabulary: int) -> Any:
    """A LLaVA with random weights: CLIP vision tower, two-layer projector, Llama with GQA."""
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_width // 32,
        image_size=IMAGE_SIDE,
        patch_size=size.patch,
        projection_dim=PROJECTION,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.decoder_width,
        intermediate_size=size.decoder_inner,
        num_hidden_layers=size.decoder_layers,
        num_attention_heads=size.decoder_width // 32,
        num_key_value_heads=size.decoder_width // 64,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=size.image_tokens,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # CLIP's own tiny initial factors slow training from nothing
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, 0, 0.02)
    return model


def build_text_tower(size: Size, vocabulary: int) -> Any:
    """A CLIP text tower with random weights; it pools at the end token."""
    # an end token with id 2 would make transformers pool at the largest id instead
    assert EOS != 2
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_width // 32,
            max_position_embeddings=64,
            projection_dim=PROJECTION,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def processor_config(size: Size) -> dict[str, Any]:
    """What `processor_config.json` holds: bicubic resize to the side, no crop, CLIP statistics."""
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": size.patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_processor": {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": side,
            "resample": 3,
            "do_center_crop": False,
            "crop_size": side,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(PIXEL_MEAN),
            "image_std": list(PIXEL_STD),
        },
    }


def export(
    directory: Path,
    llava: Any,
    text_tower: Any,
    *,
    tokenizer: Any,
    alignment: dict[str, Tensor],
    size: Size,
) -> None:
    """Writes the whole checkpoint in bfloat16, with the text tower in `text_tower/`."""
    llava.to(torch.bfloat16).save_pretrained(directory, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(directory)
    config = directory / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"processor_class": "LlavaProcessor"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (directory / "processor_config.json").write_text(
        json.dumps(processor_config(size), indent=2) + "\n"
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tower = directory / "text_tower"
    text_tower.to(torch.bfloat16).save_pretrained(tower)
    save_file(
        {name: value.detach().to("cpu", torch.bfloat16) for name, value in alignment.items()},
        tower / "alignment.safetensors",
    )
