"""The engine core against transformers' greedy generate, on tiny random checkpoints in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence
from epd.kv.handoff import KVHandoff
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.tiny import write_tiny_llava
from epd.request import FinishReason, SamplingParams

NUM_TOKENS = 36
IMAGE_TOKENS = 16
SHAPES: dict[str, dict[str, Any]] = {
    "llama-mha": {"num_kv_heads": 4},
    "llama-gqa-tied": {"tied": True},
    "llama-mqa-bias": {"num_kv_heads": 1, "qkv_bias": True},
    "llama-deep-small-rope": {"num_layers": 5, "rope_theta": 500.0},
    "llama3-rope": {
        "rope_theta": 500000.0, "max_position": 512,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "linear-rope-wide-heads": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 32,
    },
    "mistral": {"text": "mistral", "rope_theta": 1e6},
    "qwen2-tied": {"text": "qwen2", "tied": True, "rope_theta": 1e6},
    "qwen3": {"text": "qwen3", "num_heads": 6, "num_kv_heads": 3},
}  # fmt: skip


@dataclass
class Case:
    """One prompt: text bytes between images, its pixels, and what transformers answers."""

    name: str
    prompt: list[int]
    pixels: list[int]
    vision: list[torch.Tensor]
    answer: list[int]


@dataclass
class Reference:
    """A checkpoint and transformers' answers for a handful of prompts that share images."""

    card: ModelCard
    decoder: Decoder
    cases: list[Case]


PROMPTS: dict[str, tuple[str, list[int]]] = {
    "text": ("how many sides has a square?", []),
    "one": ("@what is this, and what colour has it got?", [0]),
    "same picture, other question": ("@what is this thing?", [0]),
    "two": ("first @ then @ which is larger?", [0, 1]),
    "two swapped": ("first @ then @ which is larger?", [1, 0]),
    "three, one twice": ("@@ and @ again", [2, 1, 2]),
    "short": ("x", []),
}


def tokenise(text: str) -> list[int]:
    return [1, *(4 if c == "@" else 5 + ord(c) for c in text)]


def build_reference(directory: Path, name: str) -> Reference:
    transformers = pytest.importorskip("transformers")
    path = write_tiny_llava(directory / name, seed=len(name), **SHAPES[name])
    card = ModelCard.load(path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=pixels)
    vision = list(getattr(features, "pooler_output", features))
    cases = []
    for title, (text, images) in PROMPTS.items():
        prompt = tokenise(text)
        expanded = [t for token in prompt for t in [token] * (IMAGE_TOKENS if token == 4 else 1)]
        ids = torch.tensor([expanded])
        extra = {"pixel_values": pixels[images]} if images else {}
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=NUM_TOKENS, pad_token_id=0, **extra,
            )  # fmt: skip
        answer = out[0, ids.shape[1] :].tolist()
        assert len(answer) == NUM_TOKENS
        cases.append(Case(title, prompt, images, [vision[i].detach() for i in images], answer))
    answers = {tuple(case.answer) for case in cases}
    assert len(answers) == len(cases), "the prompts must tell images and their order apart"
    return Reference(card, Decoder.load(card, "cpu", torch.float32), cases)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    directory, made = tmp_path_factory.mktemp("llava"), {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = build_reference(directory, name)
        return made[name]

    return get


def make_core(reference: Reference, **settings: Any) -> EngineCore:
    """A core whose KV pool is poisoned: whoever reads a slot nobody wrote answers nonsense."""
    layer_group = settings.pop("layer_group", None)
    config = EngineConfig(**{"block_size": 4, "num_blocks": 400, **settings})
    core = EngineCore(
        reference.decoder, reference.card, config=config, device="cpu", layer_group=layer_group
    )
    core.pool.fill(float("nan"))
    return core


def sequence_of(case: Case, **fields: Any) -> NewSequence:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    return NewSequence(
        **{
            "request_id": case.name, "attempt": 0, "prompt_token_ids": case.prompt,
            "image_token_id": 4, "mm_keys": [f"pixels{i}" for i in case.pixels],
            "sampling": sampling, "output_token_ids": [], **fields,
        }
    )  # fmt: skip


def collect(core: EngineCore, answers: dict[str, list[int]], limit: int = 5000) -> None:
    """Step until nothing is left, checking indices and that every request ends once."""
    ended = set()
    for _ in range(limit):
        if not core.has_work():
            return
        result = core.step()
        assert not result.failed
        assert not result.evicted
        core.check()
        for token in result.tokens:
            tokens = answers.setdefault(token.request_id, [])
            assert token.request_id not in ended
            assert token.output.index == len(tokens)
            tokens.append(token.output.token_id)
            if token.finish_reason is not None:
                ended.add(token.request_id)
    raise AssertionError("the core never finishes")


def run_all(core: EngineCore, cases: list[Case]) -> dict[str, list[int]]:
    for case in cases:
        core.add(sequence_of(case), case.vision)
    answers: dict[str, list[int]] = {}
    collect(core, answers)
    assert core.stats().blocks_free == core.stats().blocks_total
    return answers


def expected(cases: list[Case]) -> dict[str, list[int]]:
    return {case.name: case.answer for case in cases}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"prefix_cache": False}, id="one-batch"),
        pytest.param({"max_batched_tokens": 7, "max_num_seqs": 5}, id="tiny-chunks"),
        pytest.param({"chunked_prefill": False, "max_batched_tokens": 128}, id="whole-prompts"),
    ],
)
def test_tokens_equal_transformers(
    reference: Callable[[str], Reference], shape: str, settings: dict[str, Any]
):
    ref = reference(shape)
    core = make_core(ref, **settings)
    assert run_all(core, ref.cases) == expected(ref.cases)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_warm_prefix_cache_changes_no_token(reference: Callable[[str], Reference], shape: str):
    ref = reference(shape)
    core = make_core(ref)
    assert run_all(core, ref.cases) == expected(ref.cases)
    cold = core.stats().prefix_hits
    assert run_all(core, list(reversed(ref.cases))) == expected(ref.cases)
    assert core.stats().prefix_hits > cold + 100


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_no_token(
    reference: Callable[[str], Reference], shape: str, prefix_cache: bool
):
    ref = reference(shape)
    core = make_core(ref, num_blocks=34, max_batched_tokens=64, prefix_cache=prefix_cache)
    assert run_all(core, ref.cases) == expected(ref.cases)
    assert core.stats().preemptions > 0


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_block_size_changes_no_token(reference: Callable[[str], Reference], block_size: int):
    ref = reference("llama-gqa-tied")
    core = make_core(ref, block_size=block_size, max_batched_tokens=19)
    assert run_all(core, ref.cases) == expected(ref.cases)


def test_layers_in_two_groups_give_the_same_tokens(reference: Callable[[str], Reference]):
    ref = reference("llama-deep-small-rope")
    core = make_core(ref, layer_group=(0, 0, 1, 1, 1), max_batched_tokens=19)
    assert run_all(core, ref.cases) == expected(ref.cases)
    assert run_all(core, ref.cases) == expected(ref.cases)


def test_arrival_in_mid_flight_changes_no_token(reference: Callable[[str], Reference]):
    ref = reference("qwen2-tied")
    core = make_core(ref, max_batched_tokens=16)
    answers: dict[str, list[int]] = {}
    for case in ref.cases:
        core.add(sequence_of(case), case.vision)
        for _ in range(3):
            for token in core.step().tokens:
                answers.setdefault(token.request_id, []).append(token.output.token_id)
    while core.has_work():
        for token in core.step().tokens:
            answers.setdefault(token.request_id, []).append(token.output.token_id)
    assert answers == expected(ref.cases)


@pytest.mark.parametrize("done", [0, 1, 17, NUM_TOKENS - 1])
def test_a_retry_continues_after_the_tokens_it_is_given(
    reference: Callable[[str], Reference], done: int
):
    ref = reference("mistral")
    core = make_core(ref)
    for case in ref.cases:
        core.add(sequence_of(case, attempt=1, output_token_ids=case.answer[:done]), case.vision)
    answers = {case.name: case.answer[:done] for case in ref.cases}
    collect(core, answers)
    assert answers == expected(ref.cases)


def move(source: EngineCore, target: EngineCore, name: str) -> KVHandoff:
    """Take one held request from a core to another, through the bytes of its description."""
    import msgspec

    data = msgspec.msgpack.encode(source.offer(name))
    handoff = msgspec.msgpack.decode(data, type=KVHandoff)
    assert target.reserve(handoff, 0, None)
    tensors = source.export_kv(name)
    assert [tuple(t.shape) for t in tensors] == [handoff.shape(i) for i in range(len(tensors))]
    target.import_kv(name, [tensor.clone() for tensor in tensors])
    source.release(name)
    source.release(name)
    return handoff


@pytest.mark.parametrize("shape", SHAPES)
def test_handoff_gives_the_same_tokens(reference: Callable[[str], Reference], shape: str):
    ref = reference(shape)
    layers = ref.decoder.config.num_layers
    groups = tuple(int(i >= layers // 2) for i in range(layers))
    prefill = make_core(ref, max_batched_tokens=11, layer_group=groups)
    decode = make_core(ref, block_size=8, layer_group=groups)
    for case in ref.cases:
        prefill.add(sequence_of(case, handoff=True), case.vision)
    answers: dict[str, list[int]] = {}
    while prefill.has_work() or decode.has_work():
        result = prefill.step()
        for token in [*result.tokens, *decode.step().tokens]:
            assert token.output.index == len(answers.setdefault(token.request_id, []))
            answers[token.request_id].append(token.output.token_id)
        for name in result.handoffs:
            move(prefill, decode, name)
        prefill.check()
        decode.check()
    assert answers == expected(ref.cases)
    for core in (prefill, decode):
        stats = core.stats()
        assert (stats.held, stats.reserved, stats.running) == (0, 0, 0)
        assert stats.blocks_free == stats.blocks_total


def test_eos_and_stop_tokens_end_a_request(reference: Callable[[str], Reference]):
    ref = reference("llama-mha")
    case = ref.cases[1]
    core = make_core(ref)
    stop = case.answer[9]
    first = case.answer.index(stop)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=(stop,))
    core.add(sequence_of(case, sampling=sampling), case.vision)
    tokens = []
    while core.has_work():
        tokens += core.step().tokens
    assert [t.output.token_id for t in tokens] == case.answer[: first + 1]
    assert [t.finish_reason for t in tokens[:-1]] == [None] * first
    assert tokens[-1].finish_reason is FinishReason.STOP


def test_prefill_reports_what_it_did(reference: Callable[[str], Reference]):
    ref = reference("llama-mha")
    case = next(case for case in ref.cases if case.name == "two")
    core = make_core(ref)
    core.add(sequence_of(case), case.vision)
    (done,) = core.step().prefilled
    tokens = len(case.prompt) + 2 * (IMAGE_TOKENS - 1)
    assert (done.prompt_tokens, done.image_tokens, done.cached_tokens) == (tokens, 32, 0)
    assert done.queue_seconds >= 0
    assert done.prefill_seconds > 0
    core.add(sequence_of(case, request_id="again"), case.vision)
    (again,) = core.step().prefilled
    assert again.cached_tokens == (tokens - 1) // 4 * 4
