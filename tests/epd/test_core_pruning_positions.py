"""Vision tokens pruned before the decoder: survivors keep their positions, transformers agrees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, KeptTokens, NewSequence
from epd.errors import InvalidRequestError
from epd.kv.handoff import KVHandoff
from epd.models.card import ModelCard
from epd.models.decoder import Decoder
from epd.models.tiny import write_tiny_llava
from epd.request import FinishReason, SamplingParams

NUM_TOKENS = 36
IMAGE, SIZE = 4, 16
KEEPS: dict[str, list[int] | None] = {
    "few": [2, 5, 6, 11], "one": [15], "first": [0], "most": [*range(3), *range(5, 16)],
    "all": list(range(SIZE)), "dense": None,
}  # fmt: skip
# prompts of text and images; a letter per image says what is kept of it
CASES: dict[str, tuple[str, list[str]]] = {
    "few": ("look @ what is it?", ["few"]),
    "one": ("@?", ["one"]),
    "two": ("first @ then @ which is larger?", ["few", "most"]),
    "dense after pruned": ("first @ then @ and so on", ["one", "dense"]),
    "pruned after dense": ("first @ then @ and so on", ["dense", "first"]),
    "image last": ("what is this? @", ["few"]),
    "text": ("how many sides has a square?", []),
}


@dataclass
class Reference:
    card: ModelCard
    decoder: Decoder
    model: Any
    images: list[torch.Tensor]

    def kept_rows(self, keeps: list[str]) -> list[torch.Tensor]:
        pairs = zip(self.images, keeps, strict=False)
        return [image if KEEPS[keep] is None else image[KEEPS[keep]] for image, keep in pairs]


def tokenise(text: str) -> list[int]:
    return [1, *(IMAGE if c == "@" else 5 + ord(c) for c in text)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    path = write_tiny_llava(
        tmp_path_factory.mktemp("llava"), seed=8, text=request.param, num_layers=3,
        rope_theta=500.0,
    )  # fmt: skip
    card = ModelCard.load(path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(SIZE, 64, generator=generator) for _ in range(2)]
    return Reference(card, Decoder.load(card, "cpu", torch.float32), model.eval(), images)


@torch.no_grad()
def transformers_answer(
    ref: Reference, text: str, keeps: list[str], *, renumber: bool = False
) -> list[int]:
    """Greedy tokens of the Hugging Face decoder over kept embeddings, positions and mask given."""
    embed = ref.model.get_input_embeddings()
    rows, positions, place = [], [], 0
    images = iter(zip(ref.images, keeps, strict=False))
    for token in tokenise(text):
        if token == IMAGE:
            image, keep = next(images)
            chosen = KEEPS[keep] if KEEPS[keep] is not None else list(range(SIZE))
            rows.append(image[chosen])
            positions += [place + index for index in chosen]
            place += SIZE
        else:
            rows.append(embed(torch.tensor([token])))
            positions.append(place)
            place += 1
    if renumber:
        positions, place = list(range(len(positions))), len(positions)
    hidden, answer = torch.cat(rows), []
    for _ in range(NUM_TOKENS):
        length = len(hidden)
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        out = ref.model.model.language_model(
            inputs_embeds=hidden[None], position_ids=torch.tensor([positions]),
            attention_mask=mask, use_cache=False,
        )  # fmt: skip
        answer.append(int(ref.model.lm_head(out.last_hidden_state[0, -1]).argmax()))
        hidden = torch.cat([hidden, embed(torch.tensor(answer[-1:]))])
        positions.append(place)
        place += 1
    return answer


@pytest.fixture(scope="module")
def answers(reference: Reference) -> dict[str, list[int]]:
    made = {name: transformers_answer(reference, *case) for name, case in CASES.items()}
    assert len({tuple(answer) for answer in made.values()}) == len(made)
    assert made["few"] != transformers_answer(reference, *CASES["few"], renumber=True)
    return made


def make_core(ref: Reference, **settings: Any) -> EngineCore:
    config = EngineConfig(**{"block_size": 4, "num_blocks": 300, **settings})
    core = EngineCore(ref.decoder, ref.card, config=config, device="cpu")
    core.pool.fill(float("nan"))
    return core


def sequence_of(name: str, **fields: Any) -> NewSequence:
    text, keeps = CASES[name]
    kept = [KeptTokens(SIZE, tokens) if (tokens := KEEPS[keep]) else None for keep in keeps]
    return NewSequence(
        **{
            "request_id": name, "attempt": 0, "prompt_token_ids": tokenise(text),
            "image_token_id": IMAGE, "mm_keys": [f"pixels{i}" for i in range(len(keeps))],
            "sampling": SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True), "kept": kept,
            **fields,
        }
    )  # fmt: skip


def drain(core: EngineCore) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    while core.has_work():
        result = core.step()
        assert not result.failed
        core.check()
        for token in result.tokens:
            found.setdefault(token.request_id, []).append(token.output.token_id)
    return found


def run_all(core: EngineCore, ref: Reference) -> dict[str, list[int]]:
    for name, (_, keeps) in CASES.items():
        core.add(sequence_of(name), ref.kept_rows(keeps))
    found = drain(core)
    assert core.stats().blocks_free == core.stats().blocks_total
    return found


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="one-batch"),
        pytest.param({"max_batched_tokens": 7, "max_num_seqs": 5}, id="tiny-chunks"),
        pytest.param({"chunked_prefill": False, "max_batched_tokens": 128}, id="whole-prompts"),
    ],
)
def test_tokens_equal_transformers(
    reference: Reference, answers: dict[str, list[int]], settings: dict[str, Any]
):
    core = make_core(reference, **settings)
    assert run_all(core, reference) == answers
    assert run_all(core, reference) == answers  # from a warm prefix cache
    assert core.stats().prefix_hits > 50


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_no_token(
    reference: Reference, answers: dict[str, list[int]], prefix_cache: bool
):
    core = make_core(reference, num_blocks=30, max_batched_tokens=48, prefix_cache=prefix_cache)
    assert run_all(core, reference) == answers
    assert core.stats().preemptions > 0


@pytest.mark.parametrize("done", [1, 20])
def test_a_retry_continues_where_positions_went_on(
    reference: Reference, answers: dict[str, list[int]], done: int
):
    core = make_core(reference, max_batched_tokens=9)
    for name, (_, keeps) in CASES.items():
        core.add(
            sequence_of(name, output_token_ids=answers[name][:done]), reference.kept_rows(keeps)
        )
    assert drain(core) == {name: answer[done:] for name, answer in answers.items()}


def test_handoff_carries_the_next_position(reference: Reference, answers: dict[str, list[int]]):
    prefill, decode = make_core(reference, max_batched_tokens=11), make_core(reference)
    for name, (_, keeps) in CASES.items():
        prefill.add(sequence_of(name, handoff=True), reference.kept_rows(keeps))
    found: dict[str, list[int]] = {}
    while prefill.has_work() or decode.has_work():
        result = prefill.step()
        for token in [*result.tokens, *decode.step().tokens]:
            found.setdefault(token.request_id, []).append(token.output.token_id)
        for name in result.handoffs:
            handoff = msgspec.msgpack.decode(
                msgspec.msgpack.encode(prefill.offer(name)), type=KVHandoff
            )
            dropped = sum(SIZE - len(rows) for rows in reference.kept_rows(CASES[name][1]))
            assert handoff.next_pos == handoff.kv_lengths[0] + dropped
            assert decode.reserve(handoff, 0, None)
            decode.import_kv(name, prefill.export_kv(name))
            prefill.release(name)
    assert found == answers
    assert decode.stats().blocks_free == decode.stats().blocks_total


def test_keeping_all_is_dense_bit_for_bit(reference: Reference):
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)
    outputs = []
    for kept in ([], [KeptTokens(SIZE, list(range(SIZE)), "digest")]):
        core = make_core(reference)
        core.add(sequence_of("few", kept=kept, sampling=sampling), reference.images[:1])
        tokens = []
        while core.has_work():
            tokens += [token.output for token in core.step().tokens]
        outputs.append(tokens)
    assert outputs[0] == outputs[1]


def test_renumber_closes_the_gaps(reference: Reference):
    core = make_core(reference, max_batched_tokens=10)
    for name in ("few", "two"):
        core.add(sequence_of(name, positions="renumber"), reference.kept_rows(CASES[name][1]))
    found = drain(core)
    for name, answer in found.items():
        assert answer == transformers_answer(reference, *CASES[name], renumber=True)


def test_another_choice_or_placement_shares_no_block(
    reference: Reference, answers: dict[str, list[int]]
):
    """The same picture and prompt; only what is kept, how, or where it stands, differs."""
    core = make_core(reference)
    few = KeptTokens(SIZE, [2, 5, 6, 11])
    for kept, positions in (
        (few, "keep"), (few, "renumber"), (replace(few, digest="merged"), "keep"),
        (replace(few, num_tokens=20), "keep"), (KeptTokens(SIZE, [2, 5, 6, 12]), "keep"),
    ):  # fmt: skip
        before = core.stats().prefix_hits
        core.add(
            sequence_of("few", kept=[kept], positions=positions),
            [reference.images[0][kept.keep_indices]],
        )
        drain(core)
        assert core.stats().prefix_hits - before <= 4  # the text before the image
    core.add(sequence_of("few"), reference.kept_rows(["few"]))
    assert drain(core)["few"] == answers["few"]


def test_usage_counts_before_and_after(reference: Reference):
    core = make_core(reference)
    core.add(sequence_of("two"), reference.kept_rows(["few", "most"]))
    (done,) = core.step().prefilled
    text = len(tokenise(CASES["two"][0])) - 2
    assert (done.prompt_tokens, done.image_tokens, done.image_tokens_before) == (text + 18, 18, 32)


def test_positions_end_with_the_context(reference: Reference):
    card = replace(reference.card, max_position=40)
    core = EngineCore(reference.decoder, card, config=EngineConfig(num_blocks=64), device="cpu")
    core.add(sequence_of("few"), reference.kept_rows(["few"]))
    tokens = [token for _ in range(3) for token in core.step().tokens]
    first = len(tokenise(CASES["few"][0])) - 1 + SIZE
    while core.has_work():
        tokens += core.step().tokens
    assert len(tokens) == 40 - first
    assert tokens[-1].finish_reason is FinishReason.LENGTH
    long = sequence_of("few", prompt_token_ids=tokenise("@" + "x" * 23))
    with pytest.raises(InvalidRequestError, match="position 40; at most 39"):
        core.add(long, reference.kept_rows(["few"]))


@pytest.mark.parametrize(
    ("kept", "rows", "match"),
    [
        ([KeptTokens(16, [1, 2, 3])], 4, "4 vision tokens"),
        ([KeptTokens(16, [1, 2, 2, 3])], 4, "increasing"),
        ([KeptTokens(16, [1, 2, 3, 16])], 4, r"in \[0, 15\]"),
        ([KeptTokens(16, [-1, 2, 3, 15])], 4, "increasing"),
        ([KeptTokens(16, [1, 2]), None], 2, "2 images for 1"),
    ],
)
def test_a_contradictory_choice_is_refused(
    reference: Reference, kept: list[KeptTokens | None], rows: int, match: str
):
    core = make_core(reference)
    with pytest.raises(InvalidRequestError, match=match) as caught:
        core.add(sequence_of("few", kept=kept), [torch.zeros(rows, 64)])
    assert caught.value.param == "pruning"
    with pytest.raises(InvalidRequestError, match="keep or renumber") as caught:
        core.add(sequence_of("few", positions="squeeze"), reference.kept_rows(["few"]))
    assert caught.value.param == "pruning.positions"
    assert not core.has_work()
