"""`LLM` end to end: pictures and messages in, text out, equal to transformers on the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epd import LLM, SamplingParams
from epd.config import EngineConfig
from epd.errors import EPDError, InvalidRequestError, MediaError
from epd.images import rgb_array
from epd.models.tiny import write_tiny_llava
from epd.request import FinishReason

FREE = SamplingParams(max_tokens=32, ignore_eos=True)


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("llm") / "tiny", seed=11)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, config=EngineConfig(block_size=8, num_blocks=200, max_num_seqs=3))


def turn(*parts: Any) -> dict[str, Any]:
    shaped = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": shaped}


def image_part(image: Any = None) -> dict[str, Any]:
    return {"type": "image"} if image is None else {"type": "image", "image": image}


CONVERSATIONS: list[tuple[list[dict[str, Any]], list[int]]] = [
    ([turn("how many sides?")], []),
    ([turn(image_part(), "what is it?")], [0]),
    ([turn("is ", image_part(), " like ", image_part(), "?")], [0, 1]),
    ([turn("is ", image_part(), " like ", image_part(), "?")], [1, 0]),
    ([turn(image_part(), "one"), {"role": "assistant", "content": "yes"},
      turn("and ", image_part(), " now")], [2, 2]),
]  # fmt: skip


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> list[list[int]]:
    """The greedy answers of transformers, through its own processor and template."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False,
                              image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28]),
        tokenizer, patch_size=7, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=(checkpoint / "chat_template.jinja").read_text(),
    )  # fmt: skip
    answers = []
    for messages, images in CONVERSATIONS:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        pictures = [picture(i) for i in images] or None
        inputs = processor(text=text, images=pictures, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=0)
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def test_chat_equals_transformers_one_by_one(llm: LLM, wanted: list[list[int]]):
    for (messages, images), tokens in zip(CONVERSATIONS, wanted, strict=True):
        done = llm.chat(messages, images=[picture(i) for i in images], sampling=FREE)
        assert done.token_ids == tokens
        assert done.text == llm.formatter.tokenizer.decode(tokens, skip_special_tokens=True)
        assert done.finish_reason is FinishReason.LENGTH
        assert done.usage.image_tokens == 16 * len(images)
        assert done.usage.completion_tokens == 32


def test_chat_equals_transformers_in_one_batch(llm: LLM, wanted: list[list[int]]):
    """Five requests over three running slots: waves, chunks and finished neighbours."""
    done = llm.chat(
        [messages for messages, _ in CONVERSATIONS],
        images=[[picture(i) for i in images] for _, images in CONVERSATIONS], sampling=FREE,
    )  # fmt: skip
    assert [one.token_ids for one in done] == wanted
    stats = llm.core.stats()
    assert stats.blocks_free == stats.blocks_total


def test_generate_takes_text_and_ids(llm: LLM, wanted: list[list[int]]):
    messages, images = CONVERSATIONS[1]
    ids = llm.formatter.tokenize(messages)
    done = llm.generate(ids, images=[picture(images[0])], sampling=FREE)
    assert done.token_ids == wanted[1]
    text = "USER: <image>what is it? ASSISTANT:"
    both = llm.generate([text, ids], images=[[picture(0)], [picture(0)]], sampling=[FREE, FREE])
    assert [one.token_ids for one in both] == [wanted[1], wanted[1]]


def test_every_way_to_give_an_image_is_the_same(llm: LLM, tmp_path: Path, wanted: list[list[int]]):
    file = tmp_path / "it.png"
    picture(0).save(file)
    for image in (picture(0), file, str(file), np.asarray(picture(0))):
        done = llm.chat([turn(image_part(image), "what is it?")], sampling=FREE)
        assert done.token_ids == wanted[1]
    assert llm.chat("what is it?", images=[file], sampling=FREE).token_ids == wanted[1]


def test_each_distinct_image_is_encoded_once_per_call(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    encode = llm.vision.encode_inputs
    monkeypatch.setattr(
        llm.vision, "encode_inputs",
        lambda images, needs: seen.append(len(images)) or encode(images, needs),
    )  # fmt: skip
    conversations = [[turn(image_part(), f"question {i}")] for i in range(8)]
    llm.chat(conversations, images=[[picture(i % 2)] for i in range(8)],
             sampling=SamplingParams(max_tokens=2))  # fmt: skip
    assert sum(seen) == 2


def test_a_repeated_picture_is_a_prefix_hit(llm: LLM):
    question = [turn(image_part(), "a question of some length, asked twice?")]
    llm.chat(question, images=[picture(77)], sampling=FREE)
    again = llm.chat(question, images=[picture(77)], sampling=FREE)
    assert again.usage.cached_tokens >= again.usage.prompt_tokens - 8
    other = llm.chat(question, images=[picture(78)], sampling=FREE)
    assert other.usage.cached_tokens < 8
    assert other.token_ids != again.token_ids


def test_nothing_asked_is_nothing_answered(llm: LLM):
    assert llm.chat([]) == []
    assert llm.generate([]) == []


def test_seeded_draws_repeat_and_seeds_differ(llm: LLM):
    def draw(seed: int) -> list[int]:
        sampling = SamplingParams(temperature=1.5, seed=seed, max_tokens=16, ignore_eos=True)
        return llm.chat("tell me", sampling=sampling).token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_stop_string_cuts_the_text_and_frees_the_request(llm: LLM):
    whole = llm.chat("tell me", sampling=FREE)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    sampling = SamplingParams(max_tokens=32, ignore_eos=True, stop=(stop,))
    done = llm.chat("tell me", sampling=sampling)
    assert done.text == whole.text[: whole.text.index(stop)]
    assert done.finish_reason is FinishReason.STOP
    assert len(done.token_ids) < 32
    assert not llm.core.has_work()


def test_logprobs_come_with_the_tokens(llm: LLM):
    sampling = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=2)
    done = llm.chat("tell me", sampling=sampling)
    assert done.logprobs is not None
    for token, entry in zip(done.token_ids, done.logprobs, strict=True):
        assert entry.token_id == token
        assert entry.top[0] == (token, entry.logprob)  # greedy
        assert len(entry.top) == 2
    assert llm.chat("tell me", sampling=FREE).logprobs is None


def test_timings_are_told(llm: LLM):
    done = llm.chat("what is it?", images=[picture(5)], sampling=FREE)
    assert {"encode", "queue", "prefill"} == set(done.timeline.durations)
    assert done.timeline.ttft is not None
    assert done.timeline.tpot is not None
    assert 0 < done.timeline.ttft < done.timeline.events["finished"]


@pytest.mark.parametrize(
    ("messages", "images", "match"),
    [
        ([turn(image_part(), "x")], [], "has no image"),
        ([turn(image_part(picture(1)), "x")], [picture(2)], "belong to no image part"),
        ([turn("the literal <image> token")], [], "placeholder"),
        ([{"role": "robot", "content": "x"}], [], "role"),
        ([turn("x" * 3000)], [], "fit"),
    ],
)
def test_bad_requests_name_what_is_wrong(llm: LLM, messages: Any, images: Any, match: str):
    with pytest.raises(InvalidRequestError, match=match):
        llm.chat(messages, images=images)
    assert not llm.core.has_work()


def test_one_bad_request_of_a_list_leaves_nothing_behind(llm: LLM):
    with pytest.raises(InvalidRequestError, match="fit"):
        llm.chat(["fine", "x" * 3000, "fine too"], sampling=FREE)
    assert llm.core.stats().waiting == 0
    assert not llm.core.has_work()
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.chat("x", sampling=SamplingParams(temperature=9.0))


def test_a_failure_inside_the_model_is_raised(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such device")

    monkeypatch.setattr(llm.core._runner._decoder, "forward", broken)
    with pytest.raises(EPDError, match="the model failed"):
        llm.chat("x")
    monkeypatch.undo()
    assert llm.chat("x", sampling=FREE).usage.completion_tokens == 32


def test_random_weights_need_no_weights(checkpoint: Path):
    done = LLM(checkpoint, random_seed=3).chat("x", images=[picture(1)], sampling=FREE)
    assert done.usage.completion_tokens == 32


def test_the_built_in_model_answers():
    """A red disc on grey: the demo model's own world."""
    side = 224
    y, x = np.mgrid[:side, :side]
    pixels = np.full((side, side, 3), 100, np.uint8)
    pixels[(x - 100) ** 2 + (y - 110) ** 2 < 45**2] = (220, 40, 40)
    done = LLM().chat("What color is the circle?", images=[pixels])
    assert "red" in done.text
    assert done.finish_reason is FinishReason.STOP
    assert done.usage.image_tokens == 256


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, epd, epd.scheduler, epd.kv, epd.step, epd.images; epd.SamplingParams();"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_pictures_become_upright_rgb_on_white(tmp_path: Path):
    base = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    turned = Image.fromarray(base)
    exif = turned.getexif()
    exif[0x0112] = 6  # stored lying on its left side
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(rgb_array(tmp_path / "turned.png"), np.rot90(base, -1))
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    assert rgb_array(clear).tolist() == [[[255] * 3, [0, 0, 255]], [[255] * 3, [255] * 3]]
    deep = Image.fromarray(np.array([[0, 257 * 7, 65535]], np.uint16))
    assert rgb_array(deep)[0, :, 0].tolist() == [0, 7, 255]
    assert rgb_array(Image.new("L", (1, 1), 9)).tolist() == [[[9, 9, 9]]]


@pytest.mark.parametrize("case", ["missing", "text", "floats", "grey array", "number"])
def test_what_is_no_picture_is_refused(tmp_path: Path, case: str):
    (tmp_path / "text.png").write_text("hello")
    bad: Any = {
        "missing": tmp_path / "nowhere.png", "text": tmp_path / "text.png",
        "floats": np.zeros((2, 2, 3)), "grey array": np.zeros((2, 2), np.uint8), "number": 7,
    }[case]  # fmt: skip
    with pytest.raises(MediaError):
        rgb_array(bad)
