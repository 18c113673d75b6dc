"""The shipped checkpoint: plain transformers loads it, and it really sees."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from epd.demo import CHECKPOINT, TEXT_TOWER
from epd.demo.evaluate import (
    Answerer,
    batches,
    keep_by_greedy_dpp,
    peak_inside,
    prompt_of,
    score,
    through_png,
)
from epd.demo.examples import MULTI_TYPES, SINGLE_TYPES, held_out
from epd.demo.model import EOS, SIZES, build_tokenizer

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(CHECKPOINT)


def test_it_is_small_and_all_safetensors() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * MEBIBYTE
    assert {path.suffix for path in files} == {".json", ".jinja", ".safetensors"}
    assert all(path.stat().st_size <= 14 * MEBIBYTE for path in files)


def test_the_index_names_every_tensor_of_every_shard() -> None:
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())
    found = {}
    for shard in sorted(CHECKPOINT.glob("model-*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= dict.fromkeys(file.keys(), shard.name)
    assert index["weight_map"] == found


def test_plain_transformers_loads_it_without_missing_or_unexpected_weights() -> None:
    _, report = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_the_end_token_is_the_same_everywhere() -> None:
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
    config = json.loads((CHECKPOINT / "config.json").read_text())
    tower = json.loads((TEXT_TOWER / "config.json").read_text())
    assert {generation["eos_token_id"], config["text_config"]["eos_token_id"]} == {EOS}
    # with 2, transformers would pool the text at its largest token id
    assert tower["eos_token_id"] == EOS != 2


def test_the_shipped_tokenizer_is_the_one_the_code_builds(answerer: Answerer) -> None:
    assert answerer.processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_the_chat_template_puts_images_first(answerer: Answerer) -> None:
    example = held_out(1, 3, types=("which_image",))[0]
    content = [{"type": "text", "text": example.question}]
    content += [{"type": "image", "image": image} for image in example.images]
    prompt = answerer.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert prompt == prompt_of(example)
    assert prompt.startswith("USER: <image>\n<image>\n")
    several = answerer.processor.apply_chat_template(
        [
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            {"role": "user", "content": "Why?"},
        ],
        add_generation_prompt=True,
    )
    assert several == "USER: Hello? ASSISTANT: yes</s>USER: Why? ASSISTANT:"


def test_png_keeps_every_pixel_and_the_processor_only_normalises(answerer: Answerer) -> None:
    example = held_out(1, 4)[0]
    image = through_png(example.images[0])
    assert image.tobytes() == example.images[0].tobytes()
    pixels = answerer.inputs([example])["pixel_values"][0]
    side = SIZES["demo"].grid * SIZES["demo"].patch
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    raw = raw.view(side, side, 3).permute(2, 0, 1) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    torch.testing.assert_close(pixels, (raw - mean) / std, atol=1e-5, rtol=0)


def test_it_answers_single_images(answerer: Answerer) -> None:
    examples = held_out(22, 11, types=SINGLE_TYPES)
    result = score(examples, answerer.answer, batch_size=11)
    assert result["exact"] >= 0.9, result["wrong"]


def test_it_answers_about_two_and_three_images(answerer: Answerer) -> None:
    examples = held_out(24, 12, types=MULTI_TYPES)
    assert {len(example.images) for example in examples} == {2, 3}
    result = score(examples, answerer.answer, batch_size=9)
    assert result["exact"] >= 0.9, result["wrong"]


def test_keeping_every_token_changes_no_answer(answerer: Answerer) -> None:
    examples = [example for example in held_out(17, 13) if example.type != "caption"]
    for batch in batches(examples, 8):
        pruned = answerer.answer_pruned(batch, lambda embeddings: torch.arange(len(embeddings)))
        assert pruned == answerer.answer(batch)


def test_it_still_sees_with_a_quarter_of_its_tokens(answerer: Answerer) -> None:
    examples = held_out(34, 14)
    keep = keep_by_greedy_dpp(0.25)
    result = score(examples, lambda batch: answerer.answer_pruned(batch, keep), batch_size=17)
    assert result["exact"] >= 0.85, result["wrong"]


def test_blank_pictures_take_its_sight_away(answerer: Answerer) -> None:
    examples = held_out(22, 11, types=SINGLE_TYPES)
    keep_none = keep_by_greedy_dpp(1e-9)  # a single token an image
    result = score(examples, lambda batch: answerer.answer_pruned(batch, keep_none), batch_size=11)
    assert result["exact"] <= 0.7


def test_the_text_tower_points_into_the_named_object() -> None:
    examples = held_out(24, 15, types=("exist", "relation", "quadrant"))
    assert peak_inside(examples, CHECKPOINT, TEXT_TOWER) >= 0.85


def test_the_processor_needs_no_torchvision(answerer: Answerer) -> None:
    loaded = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
    example = held_out(1, 4)[0]
    again = loaded(images=list(example.images), text=prompt_of(example), return_tensors="pt")
    expected = answerer.inputs([example])["pixel_values"]
    torch.testing.assert_close(again["pixel_values"], expected, atol=1e-5, rtol=0)
