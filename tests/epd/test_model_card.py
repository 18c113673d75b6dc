"""Model cards: what is read, what is refused, and that reading needs neither torch nor trust."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from epd.demo import CHECKPOINT
from epd.errors import CheckpointError
from epd.models.card import ModelCard
from epd.models.checkpoint import Checkpoint, canonical_name
from epd.models.decoder import Decoder
from epd.models.registry import load_decoder, load_vision, supported_models
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny"), seed=1)


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


def refusal(path: Path | str) -> str:
    """The message of the refusal, which has three lines."""
    with pytest.raises(CheckpointError) as raised:
        ModelCard.load(path)
    message = str(raised.value)
    assert len(message.splitlines()) == 3
    assert all(message.splitlines())
    return message


def test_card_of_the_demo_model() -> None:
    card = ModelCard.load(CHECKPOINT)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert card.model_type == "llava"
    assert card.has_vision
    assert card.vocab_size == config["text_config"]["vocab_size"]
    assert card.hidden_size == config["text_config"]["hidden_size"]
    assert card.max_position == config["text_config"]["max_position_embeddings"]
    assert card.image_token_id == config["image_token_index"]
    text = config["text_config"]
    assert card.eos_token_ids == (text["eos_token_id"],)
    assert card.bos_token_id == text["bos_token_id"]
    assert card.dtype == "bfloat16"
    assert card.chat_template == (CHECKPOINT / "chat_template.jinja").read_text()
    assert len(card.revision) == len(card.encoder_revision) == 64
    assert card.revision != card.encoder_revision


def test_card_chat_and_detokenizer_import_no_torch() -> None:
    program = (
        "import sys; from epd.models.card import ModelCard; from epd.chat import ChatFormatter\n"
        "from epd.detokenize import Detokenizer; from epd.models import registry\n"
        "chat = ChatFormatter(ModelCard.load(sys.argv[1]))\n"
        "ids = chat.tokenize([{'role': 'user', 'content': 'hello'}])\n"
        "assert Detokenizer(chat.tokenizer).push(ids)\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    output = subprocess.run(
        [sys.executable, "-c", program, str(CHECKPOINT)],
        env=environment, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert output.strip() == "[]"


def test_revisions_tell_models_apart(tiny: Path, original: Path, tmp_path: Path) -> None:
    card, same = ModelCard.load(original), ModelCard.load(tiny)
    assert (card.revision, card.encoder_revision) == (same.revision, same.encoder_revision)

    edit(tiny / "tokenizer_config.json", model_max_length=99)
    renamed = ModelCard.load(tiny)
    assert renamed.revision != card.revision
    assert renamed.encoder_revision == card.encoder_revision

    edit(tiny / "processor_config.json", patch_size=99)
    assert ModelCard.load(tiny).encoder_revision != card.encoder_revision

    other = ModelCard.load(write_tiny_llava(tmp_path / "other", seed=2))
    assert other.revision != card.revision
    assert other.encoder_revision != card.encoder_revision


def test_encoder_revision_sees_every_vision_weight_and_no_text_weight(tiny: Path) -> None:
    before = ModelCard.load(tiny)
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.model.norm.weight"] += 1
    save_file(tensors, file)
    text_changed = ModelCard.load(tiny)
    assert text_changed.encoder_revision == before.encoder_revision
    assert text_changed.revision != before.revision
    tensors["vision_tower.encoder.layers.1.mlp.fc1.weight"][-1, -1] += 1
    save_file(tensors, file)
    assert ModelCard.load(tiny).encoder_revision != before.encoder_revision


def test_eos_ids_come_from_generation_config_then_config_then_family(tiny: Path) -> None:
    edit(tiny / "generation_config.json", eos_token_id=[2, 7])
    assert ModelCard.load(tiny).eos_token_ids == (2, 7)
    (tiny / "generation_config.json").unlink()
    assert ModelCard.load(tiny).eos_token_ids == (2,)
    config = json.loads((tiny / "config.json").read_text())
    del config["text_config"]["eos_token_id"]
    (tiny / "config.json").write_text(json.dumps(config))
    assert ModelCard.load(tiny).eos_token_ids == (2,)
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    assert "eos_token_id" in refusal(tiny)


def test_legacy_places_of_the_chat_template(tiny: Path) -> None:
    (tiny / "chat_template.jinja").unlink()
    assert ModelCard.load(tiny).chat_template is None
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "from tokenizer"}]
    edit(tiny / "tokenizer_config.json", chat_template=named)
    assert ModelCard.load(tiny).chat_template == "from tokenizer"
    (tiny / "chat_template.json").write_text(json.dumps({"chat_template": "from file"}))
    assert ModelCard.load(tiny).chat_template == "from file"
    (tiny / "chat_template.json").write_text(json.dumps({"chat_template": "x" * (1 << 19)}))
    assert "chat template" in refusal(tiny)


def test_a_bare_config_is_enough_for_random_weights(tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny / "config.json", bare)
    card = ModelCard.load(bare, weights=False)
    decoder, vision = Decoder.random(card.text), VisionEncoder.random(card, seed=3)
    again = VisionEncoder.random(card, seed=3)
    pixels = torch.rand(1, 3, 28, 28)
    assert decoder.resident_bytes() == Decoder.load(ModelCard.load(tiny)).resident_bytes()
    [one], [two] = vision.encode_pixels(pixels), again.encode_pixels(pixels)
    assert torch.equal(one.embeddings, two.embeddings)
    assert one.embeddings.shape == (vision.num_tokens(5, 5), card.hidden_size)
    with pytest.raises(CheckpointError, match="without them"):
        Decoder.load(card)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_before_they_are_opened(tiny: Path, name: str) -> None:
    (tiny / "model.safetensors").unlink()
    os.mkfifo(tiny / name)  # opening it would block until the test's time is up
    message = refusal(tiny)
    assert name in message
    assert "safetensors" in message


def test_pickled_weights_beside_safetensors_are_ignored(tiny: Path) -> None:
    os.mkfifo(tiny / "pytorch_model.bin")
    Decoder.load(ModelCard.load(tiny))


def test_no_weights_at_all(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(tiny)


@pytest.mark.parametrize(
    "target",
    ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "pytorch_model.bin",
     "..\\model.safetensors", "", 7, None, ["model.safetensors"]],
)  # fmt: skip
def test_an_index_may_only_name_safetensors_beside_it(tiny: Path, target: object) -> None:
    index = {"weight_map": {"lm_head.weight": target}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index" in refusal(tiny)


def test_an_index_that_names_absent_files_or_tensors(tiny: Path) -> None:
    index = tiny / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert "gone.safetensors" in refusal(tiny)
    index.write_text(json.dumps({"weight_map": {"no.such.tensor": "model.safetensors"}}))
    assert "no.such.tensor" in refusal(tiny)
    index.write_text(json.dumps({"weight_map": {}}))
    assert "weight_map" in refusal(tiny)


def test_a_truncated_file_is_named(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    message = refusal(tiny)
    assert "model.safetensors" in message
    assert "tensor" in message
    for size in (0, 4, 8, 100):
        file.write_bytes(content[:size])
        assert "model.safetensors" in refusal(tiny)


def header(**entry: Any) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}})
    return struct.pack("<Q", len(text)) + text.encode() + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        header(shape=[3]), header(dtype="F13"), header(data_offsets=[8, 0]), header(shape="2"),
        header(data_offsets=[0]), header(shape=[-2]), header(shape=[True, 2]), header(dtype=None),
        header(shape=[1 << 70]), struct.pack("<Q", 1 << 62) + bytes(64),
        struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b"\xff\xfe\x00\x01",
        struct.pack("<Q", 4000) + b"[" * 4000, struct.pack("<Q", 9) + b'{"a":[1]}',
    ],
)  # fmt: skip
def test_malformed_headers_are_refused(tiny: Path, content: bytes) -> None:
    (tiny / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(tiny)


def test_a_file_cut_after_its_card_was_read(tiny: Path) -> None:
    card = ModelCard.load(tiny)
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        Decoder.load(card)


def test_a_missing_tensor_is_named(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    tensors = load_file(file)
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, file)
    card = ModelCard.load(tiny)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        Decoder.load(card)
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.linear_2\.bias"):
        VisionEncoder.load(card)


def test_a_tensor_of_another_shape_is_named(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (tiny / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight is \[128, 64\]"):
        Decoder.load(ModelCard.load(tiny))


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '"text"', "[" * 100_000])
def test_an_unreadable_config_is_refused(tiny: Path, content: str) -> None:
    (tiny / "config.json").write_text(content)
    assert "config.json" in refusal(tiny)


def test_config_problems(tiny: Path) -> None:
    saved = (tiny / "config.json").read_text()
    edit(tiny / "config.json", model_type="kosmos-9")
    message = refusal(tiny)
    assert "kosmos-9" in message
    assert supported_models()[0] in message
    (tiny / "config.json").write_text(saved)
    edit(tiny / "config.json", text_config="llama")
    assert "text_config" in refusal(tiny)
    (tiny / "config.json").write_text(saved)
    edit(tiny / "config.json", image_token_index="<image>")
    assert "image_token_index" in refusal(tiny)
    (tiny / "config.json").unlink()
    assert "config.json" in refusal(tiny)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_of_the_checkpoint_is_never_run(tiny: Path, file: str) -> None:
    (tiny / "evil.py").write_text(f"open({str(tiny / 'ran')!r}, 'w')")
    edit(tiny / file, auto_map={"AutoConfig": "evil.Config", "AutoImageProcessor": "evil.P"})
    assert "auto_map" in refusal(tiny)
    assert not (tiny / "ran").exists()


def test_a_missing_directory(tmp_path: Path) -> None:
    assert "neither a directory" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "neither a directory" in refusal(tmp_path / "file")
    assert "neither a directory" in refusal("../../x/y")


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def offline(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refusal("some-owner/some-model")
    assert "some-owner/some-model" in message
    assert "ConnectionError" in message
    assert asked["repo"] == "some-owner/some-model"
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked["allow_patterns"])


def test_a_hub_id_that_was_downloaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(tiny))
    card = ModelCard.load("some-owner/some-model")
    assert (card.name, card.path) == ("some-owner/some-model", tiny)


def nested(name: str) -> str:
    """The name inside today's `LlavaForConditionalGeneration`."""
    name = canonical_name(name)
    return name if name.startswith("lm_head") else f"model.{name}"


LAYOUTS: dict[str, Callable[[str], str]] = {
    "flat": str,
    "nested": nested,
    "vision_model": lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_every_known_key_layout_gives_the_same_weights(
    tmp_path: Path, original: Path, layout: str, sharded: bool
) -> None:
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    renamed = {LAYOUTS[layout](k): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    if sharded:
        (tmp_path / "model.safetensors").unlink()
        names = sorted(renamed)
        parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: renamed[name] for name in part}, tmp_path / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(renamed, tmp_path / "model.safetensors")
    expected, card = ModelCard.load(original), ModelCard.load(tmp_path)
    for load in (load_decoder, lambda c: load_vision(c).tower):
        theirs, ours = load(expected).state_dict(), load(card).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_tied_embeddings_are_found_under_either_name(tmp_path: Path) -> None:
    path = write_tiny_llava(tmp_path, tied=True)
    file = path / "model.safetensors"
    tensors = load_file(file)
    assert not any("lm_head" in name for name in tensors)
    expected = Decoder.load(ModelCard.load(path))
    assert expected.head is None
    embedding = tensors.pop("language_model.model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": embedding}, file)
    assert torch.equal(Decoder.load(ModelCard.load(path)).embedding, expected.embedding)


def test_tied_in_the_config_but_apart_in_the_file(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    path = write_tiny_llava(tmp_path, tied=True)
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["language_model.lm_head.weight"] = torch.randn(261, 64)
    save_file(tensors, file, metadata={"format": "pt"})
    decoder = Decoder.load(ModelCard.load(path))
    theirs = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    assert decoder.head is not None
    assert torch.equal(decoder.head, theirs.lm_head.weight)
    assert torch.equal(decoder.embedding, theirs.model.language_model.embed_tokens.weight)


def test_checkpoint_names_and_dtype(original: Path) -> None:
    card = ModelCard.load(original)
    with Checkpoint(card) as checkpoint:
        names = checkpoint.names("multi_modal_projector.linear_1.")
        assert [name.rsplit(".")[-1] for name in names] == ["bias", "weight"]
        assert "lm_head.weight" in checkpoint
    half = Decoder.load(card, dtype=torch.float16)
    full = Decoder.load(card)
    assert (half.dtype, full.dtype, card.dtype) == (torch.float16, torch.float32, "float32")
    assert torch.equal(half.embedding, full.embedding.half())
