"""What happens to a request that is cancelled, late, malformed, poisonous or evicted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence, StepResult
from epd.errors import InvalidRequestError, WireError
from epd.models.decoder import Decoder, DecoderConfig
from epd.request import FinishReason, SamplingParams

IMAGE = 3
CONFIG = DecoderConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, max_position=256,
)  # fmt: skip
MARK = 1e4


class FussyDecoder(Decoder):
    """Raises whenever its input holds the mark, whoever else is in the batch."""

    def forward(self, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        if (hidden == MARK).any():
            raise RuntimeError("device says no, at 0x7f00dead")
        return super().forward(hidden, *args)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = FussyDecoder.random(CONFIG, "cpu", torch.float32, seed=1)
    for name, weight in made.named_parameters():
        if not name.endswith("norm.weight"):
            weight.mul_(10)  # answers hang on every token and position
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_core(decoder: Decoder, clock: Clock | None = None, **settings: Any) -> EngineCore:
    card: Any = SimpleNamespace(revision="r1", eos_token_ids=(2,), max_position=256)
    config = EngineConfig(**{"block_size": 4, "num_blocks": 64, **settings})
    core = EngineCore(decoder, card, config=config, device="cpu", clock=clock or Clock())
    core.pool.fill(float("nan"))
    return core


def new(name: str, prompt: list[int] | None = None, **fields: Any) -> NewSequence:
    tokens = prompt or [1, *(10 + ord(c) % 80 for c in name)]
    max_tokens = fields.pop("max_tokens", 8)
    return NewSequence(
        **{
            "request_id": name, "attempt": 3, "prompt_token_ids": tokens, "image_token_id": IMAGE,
            "mm_keys": [], "output_token_ids": [],
            "sampling": SamplingParams(max_tokens=max_tokens, ignore_eos=True), **fields,
        }
    )  # fmt: skip


def picture(name: str, key: str = "k", **fields: Any) -> NewSequence:
    return new(name, [1, IMAGE, 20, 21], mm_keys=[key], **fields)


def vision(value: float | None = None, length: int = 10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(length, CONFIG.hidden_size, generator=generator)
    return [tokens if value is None else torch.full_like(tokens, value)]


def drain(core: EngineCore) -> tuple[dict[str, list[int]], list[StepResult]]:
    answers: dict[str, list[int]] = {}
    results = []
    while core.has_work():
        assert len(results) < 500, "the core never finishes"
        results.append(core.step())
        core.check()
        for token in results[-1].tokens:
            answers.setdefault(token.request_id, []).append(token.output.token_id)
    return answers, results


def assert_empty(core: EngineCore) -> None:
    core.check()
    stats = core.stats()
    assert (stats.waiting, stats.running, stats.reserved, stats.held) == (0, 0, 0, 0)
    assert stats.blocks_free == stats.blocks_total
    assert core._runner._vision == {}


@pytest.mark.parametrize("poison", [MARK, float("nan"), float("inf")])
@pytest.mark.parametrize("budget", [6, 512])
def test_a_poisonous_request_fails_alone(decoder: Decoder, poison: float, budget: int):
    alone = make_core(decoder)
    for name in ("a", "b"):
        alone.add(new(name), [])
    alone.add(picture("c"), vision())
    wanted, _ = drain(alone)
    core = make_core(decoder, max_batched_tokens=budget)
    core.add(new("a"), [])
    core.add(picture("poison"), vision(poison))
    core.add(new("b"), [])
    answers, results = drain(core)
    (failure,) = [f for result in results for f in result.failed]
    assert (failure.request_id, failure.attempt) == ("poison", 3)
    assert failure.code == "internal_error"
    assert "0x" not in failure.message
    assert answers == {name: wanted[name] for name in ("a", "b")}
    assert_empty(core)
    # the same picture key, now healthy: nothing poisonous was kept under it
    core.add(picture("c"), vision())
    assert drain(core)[0]["c"] == wanted["c"]
    assert_empty(core)


def test_a_decoder_that_always_fails_fails_everyone_once(decoder: Decoder):
    core = make_core(decoder)
    for name in ("a", "b", "c"):
        core.add(picture(name, key=name), vision(MARK))
    _, results = drain(core)
    assert sorted(f.request_id for result in results for f in result.failed) == ["a", "b", "c"]
    assert_empty(core)


@pytest.mark.parametrize("state", ["waiting", "chunked", "running", "preempted", "held"])
def test_cancel_gives_everything_back(decoder: Decoder, state: str):
    settings = {
        "waiting": {"max_num_seqs": 1}, "chunked": {"max_batched_tokens": 5},
        "preempted": {"num_blocks": 6},
    }.get(state, {})  # fmt: skip
    core = make_core(decoder, **settings)
    core.add(new("other", max_tokens=9), [])
    core.add(picture("x", handoff=state == "held", max_tokens=7), vision(length=7))
    core.step()
    if state == "preempted":
        for _ in range(6):
            core.step()
        assert core.stats().preemptions == 1
        assert core.stats().waiting == 1
    core.check()
    for _ in range(2):
        core.cancel("x")
        core.check()
    core.cancel("never seen")
    answers, _ = drain(core)
    assert "x" not in answers
    assert_empty(core)


def test_cancel_of_a_reservation_gives_everything_back(decoder: Decoder):
    prefill, decode = make_core(decoder), make_core(decoder)
    prefill.add(picture("x", handoff=True), vision())
    prefill.step()
    assert decode.reserve(prefill.offer("x"), 0, None)
    assert decode.stats().reserved == 1
    decode.cancel("x")
    assert_empty(decode)
    with pytest.raises(KeyError):
        decode.import_kv("x", prefill.export_kv("x"))
    prefill.release("x")
    assert_empty(prefill)
    with pytest.raises(KeyError):
        prefill.offer("x")


def test_a_queued_request_expires_and_a_running_one_does_not(decoder: Decoder, clock: Clock):
    core = make_core(decoder, clock, max_num_seqs=1)
    core.add(new("runs", deadline=5.0), [])
    core.add(picture("waits", deadline=5.0), vision())
    core.step()
    clock.now = 5.0
    result = core.step()
    assert [(f.request_id, f.code) for f in result.failed] == [("waits", "deadline_exceeded")]
    answers, _ = drain(core)
    assert len(answers["runs"]) == 6  # and two before
    assert_empty(core)


def test_a_reservation_expires(decoder: Decoder, clock: Clock):
    prefill, decode = make_core(decoder), make_core(decoder, clock)
    prefill.add(new("x", handoff=True), [])
    prefill.step()
    assert decode.reserve(prefill.offer("x"), 7, 1.0)
    clock.now = 1.0
    (failure,) = decode.step().failed
    assert (failure.request_id, failure.attempt) == ("x", 7)
    assert_empty(decode)


@pytest.mark.parametrize(
    ("sequence", "tokens", "match"),
    [
        pytest.param(new("a", [1] * 256), [], "at most 255 fit", id="long"),
        pytest.param(picture("a"), vision(length=253), "at most 255 fit", id="long picture"),
        pytest.param(picture("a"), [], "1 image placeholders for 0", id="picture missing"),
        pytest.param(new("a"), vision(), "0 image placeholders for 1", id="picture unasked"),
        pytest.param(picture("a"), [torch.zeros(4, 31)], "hidden size", id="wrong width"),
        pytest.param(picture("a"), [torch.zeros(0, 32)], "hidden size", id="no tokens"),
        pytest.param(new("a", [1, 97]), [], "vocabulary", id="vocabulary"),
        pytest.param(new("a", [1, -1]), [], "vocabulary", id="negative"),
        pytest.param(new("a", output_token_ids=[5] * 8), [], "max_tokens", id="already ended"),
    ],
)
def test_what_can_never_run_is_refused(
    decoder: Decoder, sequence: NewSequence, tokens: list[torch.Tensor], match: str
):
    core = make_core(decoder)
    with pytest.raises(InvalidRequestError, match=match):
        core.add(sequence, tokens)
    assert not core.has_work()
    assert_empty(core)


def test_an_empty_prompt_and_a_used_id_are_refused(decoder: Decoder):
    core = make_core(decoder)
    with pytest.raises(InvalidRequestError, match="empty"):
        core.add(NewSequence(request_id="a", attempt=0, prompt_token_ids=[], image_token_id=None,
                             mm_keys=[], sampling=SamplingParams()), [])  # fmt: skip
    core.add(new("a"), [])
    with pytest.raises(InvalidRequestError, match="in use"):
        core.add(picture("a"), vision())
    assert len(drain(core)[0]["a"]) == 8
    assert_empty(core)


def test_a_placeholder_outside_the_vocabulary_is_fine(decoder: Decoder):
    """Some checkpoints give the placeholder an id past the embedding table."""
    core = make_core(decoder)
    core.add(picture("inside", max_tokens=5), vision())
    inside, _ = drain(core)
    outside = new("outside", [1, 500, 20, 21], mm_keys=["k2"], image_token_id=500, max_tokens=5,
                  sampling=SamplingParams(max_tokens=5, ignore_eos=True))  # fmt: skip
    core.add(outside, vision())
    assert drain(core)[0]["outside"] == inside["inside"]


def test_context_end_is_a_length_finish(decoder: Decoder):
    core = make_core(decoder, num_blocks=5)
    assert core.max_model_len == 20
    core.add(new("x", [1] * 7, max_tokens=100), [])
    _, results = drain(core)
    tokens = [t for result in results for t in result.tokens]
    assert len(tokens) == 13
    assert tokens[-1].finish_reason is FinishReason.LENGTH


def test_a_first_token_that_ends_the_request_is_not_held(decoder: Decoder):
    core = make_core(decoder)
    core.add(picture("x", handoff=True, max_tokens=1), vision())
    result = core.step()
    assert [t.finish_reason for t in result.tokens] == [FinishReason.LENGTH]
    assert result.handoffs == []
    assert_empty(core)


def test_a_held_request_is_no_work_and_drops_its_pictures(decoder: Decoder):
    core = make_core(decoder)
    core.add(picture("x", handoff=True), vision())
    result = core.step()
    assert result.handoffs == ["x"]
    assert [t.output.index for t in result.tokens] == [0]
    assert not core.has_work()
    assert core._runner._vision == {}
    assert core.stats().held == 1
    core.release("never seen")
    core.release("x")
    assert_empty(core)


def test_an_adopted_request_without_blocks_is_evicted_and_a_retry_continues(decoder: Decoder):
    alone = make_core(decoder)
    alone.add(picture("x", max_tokens=14), vision())
    wanted = drain(alone)[0]["x"]
    prefill, decode = make_core(decoder), make_core(decoder, num_blocks=8)
    decode.add(new("local", [1] * 9, max_tokens=14), [])
    decode.step()
    prefill.add(picture("x", handoff=True, max_tokens=14), vision())
    tokens = [t.output.token_id for t in prefill.step().tokens]
    assert decode.reserve(prefill.offer("x"), 0, None)
    decode.import_kv("x", prefill.export_kv("x"))
    prefill.release("x")
    evicted: list[str] = []
    for _ in range(14):
        result = decode.step()
        tokens += [t.output.token_id for t in result.tokens if t.request_id == "x"]
        evicted += result.evicted
    assert evicted == ["x"]
    assert 1 < len(tokens) < 14
    drain(decode)
    assert_empty(decode)
    # somewhere else the pictures are at hand
    prefill.add(picture("x", max_tokens=14, output_token_ids=tokens), vision())
    assert tokens + drain(prefill)[0]["x"] == wanted
    assert_empty(prefill)


def test_no_room_is_false_and_changes_nothing(decoder: Decoder):
    prefill, decode = make_core(decoder), make_core(decoder, num_blocks=5)
    decode.add(new("local", [1] * 11, max_tokens=4), [])
    decode.step()
    prefill.add(picture("x", handoff=True), vision())
    prefill.step()
    before = decode.stats()
    assert not decode.reserve(prefill.offer("x"), 0, None)
    assert decode.stats() == before
    drain(decode)
    assert decode.reserve(prefill.offer("x"), 0, None)


@pytest.mark.parametrize("change", ["layers", "length", "heads", "dtype"])
def test_kv_of_another_shape_is_refused(decoder: Decoder, change: str):
    prefill, decode = make_core(decoder), make_core(decoder)
    prefill.add(picture("x", handoff=True), vision())
    prefill.step()
    assert decode.reserve(prefill.offer("x"), 0, None)
    good = prefill.export_kv("x")
    bad = {
        "layers": good[:-1], "length": [t[:, 1:] for t in good],
        "heads": [t[:, :, :1] for t in good], "dtype": [t.double() for t in good],
    }[change]  # fmt: skip
    with pytest.raises(WireError):
        decode.import_kv("x", bad)
    decode.import_kv("x", good)
    assert len(drain(decode)[0]["x"]) == 7
