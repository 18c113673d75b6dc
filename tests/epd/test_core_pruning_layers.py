"""Pruning inside the decoder against an eager fp32 reference that masks instead of dropping.

The reference recomputes every layer over all tokens with explicit [L, L] attention, scores with the
whole map, and hides dropped tokens from deeper layers by a mask: it knows no cache and no gather.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from epd_pruning import available, layer_pruner
from epd_pruning.layer_base import LayerInputs, LayerPruner
from epd_pruning.schedule import Schedule, fit_average
from torch import Tensor

from epd.config import EngineConfig
from epd.core import EngineCore, KeptTokens, NewSequence
from epd.kv.handoff import KVHandoff
from epd.models.decoder import Decoder, DecoderConfig
from epd.request import SamplingParams

IMAGE, SIZE, NEW = 3, 20, 34
CONFIG = DecoderConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_layers=5, num_heads=4, num_kv_heads=2,
    head_dim=8, max_position=256,
)  # fmt: skip
LAYERS = (0, 2)
SHARES = (0.5, 0.2)
GROUPS = (0, 1, 1, 2, 2)
# text and images of a prompt, and the layer average asked for (None: not pruned inside)
CASES: dict[str, tuple[str, int | float | None]] = {
    "one": ("a @ what is it", 7),
    "bare": ("@?", 0.3),
    "two": ("see @ and @ which", 9),
    "image last": ("no text after @", 7),
    "dense": ("a @ what is it", None),
    "text": ("no image here", 5),
    "all": ("keeps all @ of it", SIZE),
    "gaps": ("b @ what is it", 5),  # pruned before the decoder too
}
GAPS = [0, 1, 4, 5, 6, 8, 9, 11, 14, 15, 17, 19]


def tokenise(text: str) -> list[int]:
    return [1, *(IMAGE if c == "@" else 10 + ord(c) % 80 for c in text)]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = Decoder.random(CONFIG, "cpu", torch.float32, seed=3)
    for name, weight in made.named_parameters():
        if not name.endswith("norm.weight"):
            weight.mul_(12)
    return made


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(SIZE, CONFIG.hidden_size, generator=generator) for _ in range(2)]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps) * weight


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """`x` [heads, L, d] turned by its positions."""
    half = CONFIG.head_dim // 2
    angles = positions[:, None] * CONFIG.rope.theta ** -(torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Eager:
    """One prompt in the reference: what it keeps after each stage, then its greedy answer."""

    def __init__(
        self, decoder: Decoder, prompt: Tensor, positions: list[int], vision: list[int],
        num_text: int, pruner: LayerPruner | None,
    ) -> None:  # fmt: skip
        self.decoder, self.pruner = decoder, pruner
        self.hidden, self.positions = prompt, torch.tensor(positions)
        self.vision, self.num_text = vision, num_text
        self.num_prompt = len(prompt)
        self.kept: dict[int, list[int]] = {}

    def layer_qk(self, hidden: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.decoder.layers[index]
        qkv = layer.attention.qkv_proj(norm(hidden, layer.input_norm.weight))
        q, k, v = qkv.view(len(hidden), -1, CONFIG.head_dim).transpose(0, 1).split([4, 2, 2])
        return rotate(q, self.positions), rotate(k, self.positions), v

    def forward(self) -> Tensor:
        """Logits of the last token over all tokens so far; chooses what to keep the first time."""
        hidden, length = self.hidden, len(self.hidden)
        hides = torch.zeros(length, dtype=torch.bool)
        for index, layer in enumerate(self.decoder.layers):
            q, k, v = self.layer_qk(hidden, index)
            logits = q @ k.repeat_interleave(2, 0).mT * CONFIG.head_dim**-0.5
            masked = torch.ones(length, length, dtype=torch.bool).triu(1) | hides
            masked &= ~torch.eye(length, dtype=torch.bool)  # a hidden row is garbage, not NaN
            attention = logits.masked_fill(masked, float("-inf")).softmax(-1)
            out = (attention @ v.repeat_interleave(2, 0)).transpose(0, 1).reshape(length, -1)
            hidden = hidden + layer.attention.o_proj(out)
            x = norm(hidden, layer.post_attention_norm.weight)
            gate, up = layer.feed_forward.gate_up_proj(x).chunk(2, -1)
            mlp = torch.nn.functional.silu(gate) * up
            hidden = hidden + layer.feed_forward.down_proj(mlp)
            if self.pruner is not None and index in self.pruner.schedule.layers:
                if index not in self.kept:
                    self.kept[index] = self.choose(index, attention, k, hidden)
                hides[list(set(self.vision) - set(self.kept[index]))] = True
        last = norm(hidden[-1], self.decoder.norm.weight)
        head = self.decoder.embedding if self.decoder.head is None else self.decoder.head
        return last @ head.T

    def choose(self, index: int, attention: Tensor, keys: Tensor, hidden: Tensor) -> list[int]:
        """The vision tokens that stay after layer `index`, by the definition of each method."""
        assert self.pruner is not None
        stage = self.pruner.schedule.layers.index(index)
        count = self.pruner.schedule.kept(len(self.vision))[stage]
        left = next((self.kept[i] for i in reversed(LAYERS) if i in self.kept), self.vision)
        text = list(range(self.num_prompt - self.num_text, self.num_prompt))
        name = self.pruner.name
        if name == "pyramiddrop":
            q, k, _ = self.layer_qk(hidden, index + 1)
            rows = [i for i in range(self.num_prompt) if i in left or i not in self.vision]
            scores = torch.einsum("hd,hld->hl", q[:, text[-1]], k.repeat_interleave(2, 0)[:, rows])
            whole = torch.zeros(len(hidden))
            whole[rows] = (scores * CONFIG.head_dim**-0.5).softmax(-1).mean(0)
        elif name == "fastv":
            whole = attention[:, text[-1]].mean(0)
        elif name == "sparsevlm":
            share = (self.hidden[self.vision] @ self.hidden[text].T).softmax(1).mean(0)
            raters = [row for row, s in zip(text, share, strict=True) if s > share.mean()]
            whole = attention[:, raters or text].mean((0, 1))
        elif name == "adaptinfer":
            own = attention[:, text][:, :, text]
            both = own + own.mT - torch.diag_embed(own.diagonal(dim1=1, dim2=2))
            whole = torch.einsum("hj,hjv->v", both.sum(1), attention[:, text])
        else:
            return self.choose_by_pivots(left, count, keys, hidden)
        assert count == len(left) or gap(whole[left], count) > 1e-5 * float(whole[left].max())
        best = whole[left].argsort(descending=True)[:count]
        return sorted(left[i] for i in best.tolist())

    def choose_by_pivots(
        self, left: list[int], count: int, keys: Tensor, hidden: Tensor
    ) -> list[int]:
        assert self.pruner is not None
        rows = torch.tensor(left)
        inputs = LayerInputs(
            queries=torch.zeros(4, 1, 8), keys=keys[:, : self.num_prompt], vision=rows,
            text=torch.tensor([self.num_prompt - 1]), scale=1.0, hidden=hidden,
        )  # fmt: skip
        return sorted(rows[self.pruner.order(inputs, count)[:count]].tolist())

    def answer(self, count: int = NEW) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        tokens, logprobs = [], []
        for _ in range(count):
            logits = self.forward()
            tokens.append(int(logits.argmax()))
            logprobs.append(float(logits.log_softmax(-1).max()))
            self.hidden = torch.cat([self.hidden, self.decoder.embedding[tokens[-1:]]])
            self.positions = torch.cat([self.positions, self.positions[-1:] + 1])
        return tokens, logprobs


def gap(scores: Tensor, count: int) -> float:
    """Distance between the worst that stays and the best that goes."""
    order = scores.sort(descending=True).values
    return float(order[count - 1] - order[count]) if 0 < count < len(order) else float("inf")


def expected_schedule(name: str) -> Schedule | None:
    """The counts that the layer average of a case comes to; None where all stay."""
    text, keep = CASES[name]
    num_images = text.count("@")
    before = SIZE * num_images
    entering = len(GAPS) if name == "gaps" else before
    if keep is None or not before or text.endswith("@") or name == "all":
        return None
    average = keep * before if isinstance(keep, float) else keep * num_images
    return fit_average(LAYERS, SHARES, num_tokens=entering, num_layers=5, average=average)


def make_pruner(name: str, schedule: Schedule | None = None) -> LayerPruner:
    params = {"num_pivots": 2} if name == "dart_layer" else {}
    ratios = Schedule(LAYERS, ratios=SHARES, of="original")
    return layer_pruner(name, schedule or ratios, params=params)


def eager_of(
    decoder: Decoder, images: list[Tensor], name: str, method: str | None = "adaptinfer"
) -> Eager:
    rows: list[Tensor] = []
    positions: list[int] = []
    vision: list[int] = []
    spare, place, length, after = iter(images), 0, 0, 0
    for token in tokenise(CASES[name][0]):
        if token == IMAGE:
            chosen = GAPS if name == "gaps" else list(range(SIZE))
            rows.append(next(spare)[chosen])
            positions += [place + index for index in chosen]
            vision += range(length, length + len(chosen))
            length, place, after = length + len(chosen), place + SIZE, 0
        else:
            rows.append(decoder.embedding[[token]])
            positions.append(place)
            length, place, after = length + 1, place + 1, after + 1
    schedule = expected_schedule(name)
    pruner = make_pruner(method, schedule) if method and schedule else None
    return Eager(decoder, torch.cat(rows), positions, vision, after, pruner)


@pytest.fixture(scope="module")
def answers(decoder: Decoder, images: list[Tensor]) -> dict[str, list[int]]:
    with torch.no_grad():
        made = {name: eager_of(decoder, images, name).answer()[0] for name in CASES}
        assert made["one"] != eager_of(decoder, images, "one", None).answer()[0]
    assert made["one"] != made["dense"]
    return made


def make_core(decoder: Decoder, pruner: LayerPruner | None = None, **settings: Any) -> EngineCore:
    card: Any = SimpleNamespace(revision="r1", eos_token_ids=(2,), max_position=256)
    config = EngineConfig(**{"block_size": 4, "num_blocks": 200, **settings})
    core = EngineCore(
        decoder, card, config=config, device="cpu", layer_pruner=pruner or make_pruner("adaptinfer")
    )
    core.pool.fill(float("nan"))
    return core


def sequence_of(name: str, **fields: Any) -> NewSequence:
    text, keep = CASES[name]
    kept = [KeptTokens(SIZE, GAPS)] if name == "gaps" else []
    return NewSequence(
        **{
            "request_id": name, "attempt": 0, "prompt_token_ids": tokenise(text),
            "image_token_id": IMAGE, "mm_keys": [f"pixels{i}" for i in range(text.count("@"))],
            "sampling": SamplingParams(max_tokens=NEW, ignore_eos=True), "kept": kept,
            "layer_keep": keep, **fields,
        }
    )  # fmt: skip


def vision_of(name: str, images: list[Tensor]) -> list[Tensor]:
    return [images[0][GAPS]] if name == "gaps" else images[: CASES[name][0].count("@")]


def steps(core: EngineCore) -> Iterator[Any]:
    for _ in range(1000):
        if not core.has_work():
            return
        result = core.step()
        assert not result.failed
        core.check()
        yield result
    raise AssertionError("the core never finishes")


def drain(core: EngineCore) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for result in steps(core):
        for token in result.tokens:
            assert token.output.index == len(found.setdefault(token.request_id, []))
            found[token.request_id].append(token.output.token_id)
    assert core.stats().blocks_free == core.stats().blocks_total
    return found


def add_all(core: EngineCore, images: list[Tensor], **fields: Any) -> None:
    for name in CASES:
        core.add(sequence_of(name, **fields), vision_of(name, images))


def lengths_of(name: str, num_output: int) -> list[int]:
    """KV length of each layer group when `num_output` tokens were sampled."""
    text = len(tokenise(CASES[name][0])) - CASES[name][0].count("@")
    entering = len(GAPS) if name == "gaps" else SIZE * CASES[name][0].count("@")
    schedule = expected_schedule(name)
    kept = schedule.kept(entering) if schedule else (entering, entering)
    return [text + vision + num_output - 1 for vision in (entering, *kept)]


@pytest.mark.parametrize("method", available("layer"))
@torch.no_grad()
def test_dropping_is_masking_through_34_tokens(decoder: Decoder, images: list[Tensor], method: str):
    """Each method alone: tokens, log-probabilities, and the KV length of every group each step."""
    for name in ("one", "two", "gaps"):
        tokens, logprobs = eager_of(decoder, images, name, method).answer()
        core = make_core(decoder, make_pruner(method))
        sampling = SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=1)
        core.add(sequence_of(name, sampling=sampling), vision_of(name, images))
        outputs = []
        for result in steps(core):
            outputs += [token.output for token in result.tokens]
            if core.has_work():
                table = core._scheduler.sequences[name].table
                assert table.lengths == lengths_of(name, len(outputs))
                held = [len(blocks) for blocks in table.blocks]
                assert held == [-(-length // 4) for length in table.lengths]
        assert [output.token_id for output in outputs] == tokens
        assert [output.logprob for output in outputs] == pytest.approx(logprobs, abs=2e-4)
        assert lengths_of(name, 1)[0] > lengths_of(name, 1)[1] > lengths_of(name, 1)[2]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="one-batch"),
        pytest.param({"max_batched_tokens": 8, "max_num_seqs": 5}, id="budget-below-prompt"),
        pytest.param({"chunked_prefill": False, "max_batched_tokens": 128}, id="whole-prompts"),
        pytest.param({"block_size": 1, "num_blocks": 700}, id="block-of-one"),
        pytest.param({"prefix_cache": False, "block_size": 16}, id="no-prefix-cache"),
    ],
)
def test_a_mixed_batch_equals_each_alone(
    decoder: Decoder, images: list[Tensor], answers: dict[str, list[int]], settings: dict[str, Any]
):
    core = make_core(decoder, **settings)
    for _ in range(2):  # the second time with a warm prefix cache
        add_all(core, images)
        assert drain(core) == answers


def test_prompts_join_those_who_decode(
    decoder: Decoder, images: list[Tensor], answers: dict[str, list[int]]
):
    core = make_core(decoder)
    found: dict[str, list[int]] = {}
    for name in CASES:
        core.add(sequence_of(name), vision_of(name, images))
        for _ in range(2):
            for token in core.step().tokens:
                found.setdefault(token.request_id, []).append(token.output.token_id)
    for name, tokens in drain_into(core, found).items():
        assert tokens == answers[name]


def drain_into(core: EngineCore, found: dict[str, list[int]]) -> dict[str, list[int]]:
    for result in steps(core):
        for token in result.tokens:
            found.setdefault(token.request_id, []).append(token.output.token_id)
    return found


@pytest.mark.parametrize("num_blocks", [24, 36])
def test_preemption_changes_no_token(
    decoder: Decoder, images: list[Tensor], answers: dict[str, list[int]], num_blocks: int
):
    core = make_core(decoder, num_blocks=num_blocks)
    add_all(core, images)
    assert drain(core) == answers
    assert core.stats().preemptions > 0


@pytest.mark.parametrize("done", [1, 17])
def test_a_retry_chooses_by_the_prompt_alone(
    decoder: Decoder, images: list[Tensor], answers: dict[str, list[int]], done: int
):
    core = make_core(decoder)
    for name in CASES:
        core.add(sequence_of(name, output_token_ids=answers[name][:done]), vision_of(name, images))
    found: dict[str, list[int]] = {name: answer[:done] for name, answer in answers.items()}
    assert drain_into(core, found) == answers


def test_handoff_moves_each_group_at_its_length(
    decoder: Decoder, images: list[Tensor], answers: dict[str, list[int]]
):
    prefill, decode = make_core(decoder), make_core(decoder, block_size=8)
    add_all(prefill, images, handoff=True)
    found: dict[str, list[int]] = {}
    while prefill.has_work() or decode.has_work():
        result = prefill.step()
        for token in [*result.tokens, *decode.step().tokens]:
            found.setdefault(token.request_id, []).append(token.output.token_id)
        for name in result.handoffs:
            data = msgspec.msgpack.encode(prefill.offer(name))
            handoff = msgspec.msgpack.decode(data, type=KVHandoff)
            assert handoff.kv_lengths == lengths_of(name, 1)
            tensors = prefill.export_kv(name)
            assert [t.shape[1] for t in tensors] == [handoff.kv_lengths[g] for g in GROUPS]
            assert decode.reserve(handoff, 0, None)
            decode.import_kv(name, tensors)
            prefill.release(name)
        prefill.check()
        decode.check()
    assert found == answers
    for core in (prefill, decode):
        assert core.stats().blocks_free == core.stats().blocks_total


def test_one_picture_two_questions_two_budgets_interleaved(decoder: Decoder, images: list[Tensor]):
    """Nothing of one answer enters another: each equals a run in a core of its own."""
    questions = ["a @ what is it", "a @ what was it"]
    wanted: dict[str, list[int]] = {}
    asked: list[tuple[str, str, int | None]] = [
        (f"{text}/{keep}", text, keep) for text in questions for keep in (5, 9, None)
    ]

    def ask(core: EngineCore, name: str, text: str, keep: int | None) -> list[int]:
        sequence = sequence_of(
            "one", request_id=name, prompt_token_ids=tokenise(text), layer_keep=keep
        )
        core.add(sequence, images[:1])
        return drain(core)[name]

    for one in asked:
        wanted[one[0]] = ask(make_core(decoder, block_size=2), *one)
    assert len({tuple(answer) for answer in wanted.values()}) == len(asked)
    warm = make_core(decoder, block_size=2)
    for order in (asked, asked[::-1], asked[3:] + asked[:3]):
        for one in order:
            assert ask(warm, *one) == wanted[one[0]]
    assert warm.stats().prefix_hits > 0  # the dense ones share


def test_usage_and_groups(decoder: Decoder, images: list[Tensor]):
    core = make_core(decoder)
    assert core.facts.layer_group == GROUPS
    core.add(sequence_of("gaps"), vision_of("gaps", images))
    (done,) = core.step().prefilled
    assert (done.image_tokens, done.image_tokens_before) == (len(GAPS), SIZE)
    assert done.prompt_tokens == lengths_of("gaps", 1)[0]
