"""Layer pruning in a core: what it refuses, who it shares a step with, what an end gives back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from epd.config import EngineConfig
from epd.core import EngineCore, NewSequence
from epd.errors import ConfigError, InvalidRequestError
from epd.models.decoder import Decoder, DecoderConfig, Stream
from epd.models.layer_pruning import SCHEDULE_FILE, resolve_layer_pruner
from epd.request import SamplingParams, TokenOutput
from epd.sequence import Sequence
from epd_pruning import available, layer_pruner
from epd_pruning.schedule import Schedule

IMAGE, SIZE, MARK = 3, 24, 1e4
CONFIG = DecoderConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2,
    head_dim=8, max_position=256,
)  # fmt: skip
SCHEDULE = Schedule((0, 2), ratios=(0.5, 0.25), of="original")
PROMPT = [1, 11, IMAGE, 20, 21, 22]


class FussyDecoder(Decoder):
    """Raises between layers whenever the stream holds the mark."""

    def advance(self, stream: Stream, *args: Any) -> Stream:
        if (stream.residual == MARK).any():
            raise RuntimeError("device says no")
        return super().advance(stream, *args)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    made = FussyDecoder.random(CONFIG, "cpu", torch.float32, seed=5)
    for name, weight in made.named_parameters():
        if not name.endswith("norm.weight"):
            weight.mul_(10)
    return made


def make_core(decoder: Decoder, clock: Callable[[], float] = float, **settings: Any) -> EngineCore:
    card: Any = SimpleNamespace(revision="r1", eos_token_ids=(2,), max_position=256)
    config = EngineConfig(**{"block_size": 4, "num_blocks": 64, **settings})
    core = EngineCore(
        decoder, card, config=config, device="cpu", clock=clock,
        layer_pruner=layer_pruner("adaptinfer", SCHEDULE),
    )  # fmt: skip
    core.pool.fill(float("nan"))
    return core


def new(name: str, **fields: Any) -> NewSequence:
    sampling = SamplingParams(max_tokens=fields.pop("max_tokens", 8), ignore_eos=True, logprobs=3)
    return NewSequence(
        **{
            "request_id": name, "attempt": 0, "prompt_token_ids": PROMPT, "image_token_id": IMAGE,
            "mm_keys": ["k"], "sampling": sampling, "layer_keep": 12, **fields,
        }
    )  # fmt: skip


def vision(value: float | None = None) -> list[Tensor]:
    tokens = torch.randn(SIZE, CONFIG.hidden_size, generator=torch.Generator().manual_seed(6))
    return [tokens if value is None else torch.full_like(tokens, value)]


def drain(core: EngineCore) -> dict[str, list[TokenOutput]]:
    found: dict[str, list[TokenOutput]] = {}
    for _ in range(500):
        if not core.has_work():
            return found
        result = core.step()
        core.check()
        for token in result.tokens:
            found.setdefault(token.request_id, []).append(token.output)
    raise AssertionError("the core never finishes")


def assert_empty(core: EngineCore) -> None:
    core.check()
    stats = core.stats()
    assert (stats.waiting, stats.running, stats.reserved, stats.held) == (0, 0, 0, 0)
    assert stats.blocks_free == stats.blocks_total


def answer(decoder: Decoder, change: Callable[[Sequence], None], **fields: Any) -> Any:
    core = make_core(decoder)
    core.add(new("x", max_tokens=34, **fields), vision())
    change(core._scheduler.sequences["x"])
    return drain(core)["x"]


def test_a_schedule_that_keeps_all_is_dense_bit_for_bit(decoder: Decoder):
    def keep_all(sequence: Sequence) -> None:
        sequence.schedule, sequence.dropped = Schedule((0, 2), (SIZE, SIZE)), (0, 0, 0)

    dense = answer(decoder, lambda _: None, layer_keep=None)
    assert answer(decoder, keep_all, layer_keep=None) == dense
    assert answer(decoder, lambda _: None, layer_keep=SIZE) == dense
    assert answer(decoder, lambda _: None, layer_keep=1.0) == dense
    assert answer(decoder, lambda _: None, layer_keep=12) != dense


def test_a_stage_that_keeps_all_is_passed_over(decoder: Decoder):
    def late(sequence: Sequence) -> None:
        sequence.schedule, sequence.dropped = Schedule((0, 2), (SIZE, 6)), (0, 0, SIZE - 6)

    core = EngineCore(
        decoder, SimpleNamespace(revision="r1", eos_token_ids=(), max_position=256),  # type: ignore[arg-type]
        config=EngineConfig(num_blocks=64, block_size=4), device="cpu",
        layer_pruner=layer_pruner("adaptinfer", Schedule((2,), ratios=(0.25,))),
    )  # fmt: skip
    core.add(new("x", max_tokens=34, layer_keep=(3 * SIZE + 6) / 4 / SIZE), vision())
    outputs = drain(core)["x"]
    assert outputs == answer(decoder, late)


@pytest.mark.parametrize("poison", [MARK, float("nan")])
def test_a_poisonous_request_fails_alone(decoder: Decoder, poison: float):
    alone = make_core(decoder)
    alone.add(new("a"), vision())
    wanted = drain(alone)["a"]
    core = make_core(decoder)
    core.add(new("a"), vision())
    core.add(new("poison", mm_keys=["p"]), vision(poison))
    core.add(new("b", layer_keep=None), vision())
    result = core.step()
    assert [failure.request_id for failure in result.failed] == ["poison"]
    found = drain(core)
    tokens = [token.output for token in result.tokens if token.request_id == "a"]
    assert [o.token_id for o in tokens + found["a"]] == [o.token_id for o in wanted]
    assert_empty(core)


@pytest.mark.parametrize("state", ["waiting", "running", "preempted", "held"])
def test_cancel_gives_everything_back(decoder: Decoder, state: str):
    settings = {"waiting": {"max_num_seqs": 1}, "preempted": {"num_blocks": 17}}.get(state, {})
    core = make_core(decoder, **settings)
    core.add(new("other", max_tokens=12), vision())
    core.add(new("x", handoff=state == "held", max_tokens=12), vision())
    core.step()
    if state == "preempted":
        for _ in range(9):
            core.step()
        assert (core.stats().preemptions, core.stats().waiting) == (1, 1)
    for _ in range(2):
        core.cancel("x")
        core.check()
    assert "x" not in drain(core)
    assert_empty(core)


def test_a_reservation_is_cancelled_or_expires(decoder: Decoder):
    now = [0.0]
    prefill, decode = make_core(decoder), make_core(decoder, lambda: now[0])
    prefill.add(new("x", handoff=True), vision())
    prefill.step()
    offer = prefill.offer("x")
    assert offer.kv_lengths[0] > offer.kv_lengths[1] > offer.kv_lengths[2]
    assert decode.reserve(offer, 0, None)
    table = decode._scheduler.sequences["x"].table
    assert table is not None
    assert [len(blocks) for blocks in table.blocks] == [n // 4 + 1 for n in offer.kv_lengths]
    decode.cancel("x")
    assert_empty(decode)
    assert decode.reserve(offer, 0, 1.0)
    now[0] = 1.0
    assert [failure.code for failure in decode.step().failed] == ["deadline_exceeded"]
    assert_empty(decode)
    prefill.release("x")
    assert_empty(prefill)


def test_an_adopted_request_without_blocks_is_evicted(decoder: Decoder):
    alone = make_core(decoder)
    alone.add(new("x", max_tokens=20), vision())
    wanted = [output.token_id for output in drain(alone)["x"]]
    prefill, decode = make_core(decoder), make_core(decoder, num_blocks=17)
    decode.add(new("local", max_tokens=20), vision())
    decode.step()
    prefill.add(new("x", handoff=True, max_tokens=20), vision())
    tokens = [t.output.token_id for t in prefill.step().tokens]
    assert decode.reserve(prefill.offer("x"), 0, None)
    decode.import_kv("x", prefill.export_kv("x"))
    prefill.release("x")
    evicted: list[str] = []
    while decode.has_work():
        result = decode.step()
        decode.check()
        tokens += [t.output.token_id for t in result.tokens if t.request_id == "x"]
        evicted += result.evicted
    assert evicted == ["x"]
    assert 1 < len(tokens) < 20
    assert_empty(decode)
    prefill.add(new("x", max_tokens=20, output_token_ids=tokens), vision())
    assert tokens + [output.token_id for output in drain(prefill)["x"]] == wanted


def test_a_core_of_other_layer_groups_refuses_the_kv(decoder: Decoder):
    prefill = make_core(decoder)
    prefill.add(new("x", handoff=True), vision())
    prefill.step()
    card: Any = SimpleNamespace(revision="r1", eos_token_ids=(2,), max_position=256)
    dense = EngineCore(decoder, card, config=EngineConfig(num_blocks=8), device="cpu")
    with pytest.raises(Exception, match="layer_group"):
        dense.reserve(prefill.offer("x"), 0, None)


def test_a_pruned_prompt_is_one_chunk_beyond_the_budget_if_need_be(decoder: Decoder):
    core = make_core(decoder, max_batched_tokens=16)
    core.add(new("decodes", layer_keep=None, max_tokens=30), vision())
    while not core.step().tokens:
        pass
    core.add(new("chunked", mm_keys=["c"], layer_keep=None), vision())
    core.add(new("whole"), vision())
    core.add(new("behind", mm_keys=["d"], layer_keep=None), vision())
    sizes = [core.step().num_tokens for _ in range(4)]
    # 1 decode + 15; then the other 14; then all 29 rows at once; the next waits for its turn
    assert sizes == [16, 15, 31, 16]
    drain(core)
    assert_empty(core)


def test_blocks_are_reserved_by_what_each_group_will_hold(decoder: Decoder):
    core = make_core(decoder)
    core.add(new("x"), vision())
    plan = core._scheduler.schedule()
    sequence = core._scheduler.sequences["x"]
    rows = [plan.chunks[0].rows(group) for group in range(3)]
    assert rows[0] == 5 + SIZE
    assert rows[0] > rows[1] > rows[2] > 5
    assert sequence.table is not None
    assert [len(blocks) for blocks in sequence.table.blocks] == [-(-n // 4) for n in rows]


def test_nothing_past_the_length_of_a_group_is_written(decoder: Decoder):
    core = make_core(decoder)
    core.add(new("x", handoff=True), vision())
    core.step()
    offer = core.offer("x")
    written = [
        int((~core.pool.layer(layer)[0].isnan()).all(-1).all(-1).sum()) for layer in range(4)
    ]
    assert written == [offer.kv_lengths[group] for group in (0, 1, 1, 2)]


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (0, "at least 1"), (-3, "at least 1"), (0.0, r"\(0, 1\]"), (1.5, r"\(0, 1\]"),
        (float("nan"), r"\(0, 1\]"), (1, r"in \[6.0, 24\] for pruning after layers \(0, 2\)"),
    ],
)  # fmt: skip
def test_a_layer_budget_out_of_range_is_refused(decoder: Decoder, keep: float, match: str):
    core = make_core(decoder)
    with pytest.raises(InvalidRequestError, match=match) as caught:
        core.add(new("x", layer_keep=keep), vision())
    assert caught.value.param == "pruning.layer_keep"
    assert_empty(core)


def test_a_core_without_a_method_refuses_to_prune(decoder: Decoder):
    card: Any = SimpleNamespace(revision="r1", eos_token_ids=(2,), max_position=256)
    core = EngineCore(decoder, card, config=EngineConfig(num_blocks=8), device="cpu")
    with pytest.raises(InvalidRequestError, match="inside the decoder") as caught:
        core.add(new("x"), vision())
    assert caught.value.param == "pruning.method"


@pytest.mark.parametrize("name", available("layer"))
@pytest.mark.parametrize("depth", [2, 3, 7, 32, 80])
def test_every_method_finds_layers_in_every_depth(tmp_path: Path, name: str, depth: int):
    pruner = resolve_layer_pruner(name, tmp_path, depth)
    layers = pruner.schedule.layers
    pruner.schedule.check(depth)
    kept = pruner.schedule.kept(576)
    assert pruner.name == name
    assert 576 > kept[0] >= kept[-1]
    published = pruner.presets.get("llava-1.5-7b/64") or next(iter(pruner.presets.values()))
    if depth == 32:
        assert layers == published.layers
        assert kept == published.kept(576)
    assert set(pruner.schedule.layer_groups(depth)) == set(range(len(layers) + 1))


def test_layers_and_schedule_files_are_taken(tmp_path: Path):
    given = resolve_layer_pruner("adaptinfer:1,3,4", tmp_path, 7)
    assert given.schedule.layers == (1, 3, 4)
    assert given.schedule.kept(576) == (133, 27, 3)
    assert resolve_layer_pruner("fastv:1,3", tmp_path, 7).schedule.kept(576) == (30, 30)
    shipped = Schedule((2, 5), (40, 9))
    (tmp_path / SCHEDULE_FILE).write_text(shipped.to_json())
    assert resolve_layer_pruner("adaptinfer", tmp_path, 7).schedule == shipped
    assert resolve_layer_pruner("adaptinfer:1", tmp_path, 7).schedule.layers == (1,)
    assert resolve_layer_pruner("fastv", tmp_path, 7).schedule.layers == (0,)
    with pytest.raises(ConfigError, match=r"schedule.layers must be in \[0, 4\]"):
        resolve_layer_pruner("adaptinfer", tmp_path, 6)
    (tmp_path / SCHEDULE_FILE).write_text("{")
    with pytest.raises(ConfigError, match="an object with layers"):
        resolve_layer_pruner("adaptinfer", tmp_path, 7)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("script", "method must be one of adaptinfer, dart_layer"),
        ("", "method must be one of"),
        ("adaptinfer:3", "schedule.layers must be in [0, 2]"),
        ("adaptinfer:-1", "schedule.layers must be in [0, 2]"),
        ("adaptinfer:1,0", "schedule.layers must be strictly increasing"),
        ("adaptinfer:1,1", "schedule.layers must be strictly increasing"),
        ("adaptinfer:a", "schedule.layers must be whole numbers"),
        ("adaptinfer:0,", "schedule.layers must be whole numbers"),
    ],
)
def test_a_setting_that_cannot_run_ends_the_start(
    decoder: Decoder, tmp_path: Path, setting: str, match: str
):
    card: Any = SimpleNamespace(revision="r1", eos_token_ids=(2,), max_position=256, path=tmp_path)
    config = EngineConfig(num_blocks=8, layer_pruning=setting)
    with pytest.raises(ConfigError, match=f"layer_pruning: {re.escape(match)}"):
        EngineCore(decoder, card, config=config, device="cpu")


def test_a_pruner_that_cannot_run_ends_the_start(decoder: Decoder):
    card: Any = SimpleNamespace(revision="r1", eos_token_ids=(2,), max_position=256)
    for pruner, match in (
        (layer_pruner("adaptinfer", Schedule((0, 3), (4, 2))), r"in \[0, 2\]"),
        (layer_pruner("adaptinfer", Schedule(())), "at least one layer"),
        (layer_pruner("sparsevlm", SCHEDULE, params={"recycling": True}), "sparsevlm with recycl"),
    ):
        with pytest.raises(ConfigError, match=match):
            EngineCore(
                decoder, card, config=EngineConfig(num_blocks=8), device="cpu", layer_pruner=pruner
            )
