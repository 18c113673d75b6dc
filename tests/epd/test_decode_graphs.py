"""Decode steps as recordings, replayed on a CPU by a twin that spoils its buffers in between."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore
from epd.decode_graphs import DecodeGraphs, DecodeShape, batch_sizes, length_bounds
from epd.graphs import default_recorder
from epd.request import SamplingParams

from .recorded import Spoiled, core_maker


@pytest.fixture
def build(layer_bench: Any) -> Callable[..., EngineCore]:
    return core_maker(layer_bench)


def test_sizes_and_bounds_end_with_the_largest() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(5) == [1, 2, 4, 5]
    assert batch_sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert batch_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]
    assert length_bounds(200) == [200]
    assert length_bounds(4096) == [1024, 4096]
    assert length_bounds(20_000) == [1024, 4096, 16384, 20_000]
    for size in range(1, 130):
        waste = next(b for b in batch_sizes(256) if b >= size) / size
        assert waste < 2


def test_a_cpu_records_nothing_by_itself() -> None:
    assert default_recorder("cpu", graphs=True) is None


def test_tokens_equal_the_eager_ones_while_batches_grow_and_shrink(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    recorder = Spoiled()
    core = build(recorder, max_num_seqs=6, cuda_graphs=False)
    assert recorder.recorded == len(batch_sizes(6))
    found: dict[str, list[int]] = {}
    lengths = {name: 3 + 4 * i for i, name in enumerate(layer_bench.cases)}
    for name, length in lengths.items():  # one more every other step
        sampling = SamplingParams(max_tokens=length, ignore_eos=True)
        core.add(layer_bench.sequence(name, sampling=sampling), layer_bench.vision(name))
        for _ in range(2):
            for token in core.step().tokens:
                found.setdefault(token.request_id, []).append(token.output.token_id)
    layer_bench.drain(core, found)
    for name, length in lengths.items():
        assert found[name] == layer_bench.alone[name][:length], name
    assert recorder.steps >= max(lengths.values()) - 2 * len(lengths)


def test_preempted_requests_give_the_same_tokens(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    core = build(recorder := Spoiled(), num_blocks=45, prefix_cache=False)
    layer_bench.add_all(core)
    assert layer_bench.drain(core) == layer_bench.alone
    assert core.stats().preemptions > 0
    assert recorder.steps > 0


def test_handed_over_requests_go_on_in_recordings(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    giver, taker = build(Spoiled()), build(recorder := Spoiled(), max_num_seqs=3)
    for name in ("one", "text", "gaps"):
        giver.add(layer_bench.sequence(name, handoff=True), layer_bench.vision(name))
    found: dict[str, list[int]] = {}
    while giver.has_work():
        result = giver.step()
        found |= {token.request_id: [token.output.token_id] for token in result.tokens}
        for name in result.handoffs:
            assert taker.reserve(giver.offer(name), 0, None)
            taker.import_kv(name, giver.export_kv(name))
            giver.release(name)
    while taker.has_work():
        for token in taker.step().tokens:
            found[token.request_id].append(token.output.token_id)
    assert found == {name: layer_bench.alone[name] for name in ("one", "text", "gaps")}
    assert recorder.steps == layer_bench.new - 1


@pytest.mark.parametrize("kv", ["fp8", "int4"])
def test_coded_kv_gives_the_eager_tokens(
    layer_bench: Any, build: Callable[..., EngineCore], kv: str
) -> None:
    answers = []
    for recorder in (None, Spoiled()):
        core = build(recorder, kv=kv)
        core.pool.fill(float("nan"))
        layer_bench.add_all(core)
        answers.append(layer_bench.drain(core))
    assert answers[0] == answers[1]


def test_sampling_parameters_hold_in_recordings(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    asked = {
        "one": SamplingParams(temperature=0.9, seed=3, max_tokens=12, ignore_eos=True),
        "bare": SamplingParams(repetition_penalty=1.3, max_tokens=12, ignore_eos=True),
        "two": SamplingParams(logprobs=2, max_tokens=12, ignore_eos=True),
        "text": SamplingParams(max_tokens=12, ignore_eos=True),
    }
    answers = []
    for recorder in (None, Spoiled()):
        core, outputs = build(recorder), []
        for name, sampling in asked.items():
            core.add(layer_bench.sequence(name, sampling=sampling), layer_bench.vision(name))
        for result in layer_bench.steps(core):
            outputs += [(t.request_id, t.output.token_id, t.output.logprob) for t in result.tokens]
        answers.append(outputs)
    for (name, token, logprob), other in zip(*answers, strict=True):
        assert (name, token) == other[:2]
        assert (logprob is None) == (other[2] is None)
        assert logprob is None or logprob == pytest.approx(other[2], abs=1e-4)


def test_a_step_writes_the_slots_of_its_tokens_and_no_other(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    core = build(Spoiled(), prefix_cache=False)
    for name in ("one", "two", "text"):
        core.add(layer_bench.sequence(name), layer_bench.vision(name))
    while len(core._scheduler.running) < 3:
        core.step()
    before = [core.pool.gather(range(200), 800, layers=[i])[0].clone() for i in range(5)]
    expected = [set[int]() for _ in range(5)]
    for sequence in core._scheduler.running:
        table = sequence.table
        assert table is not None
        for layer, group in enumerate(layer_bench.groups):
            place = table.lengths[group]
            core.blocks.grow(table, 1)
            expected[layer].add(table.blocks[group][place // 4] * 4 + place % 4)
    assert len(core.step().tokens) == 3  # padded to 4
    for layer, old in enumerate(before):
        new = core.pool.gather(range(200), 800, layers=[layer])[0]
        changed = ~torch.isclose(old, new, rtol=0, atol=0, equal_nan=True)
        assert set(changed.any(0).flatten(1).any(1).nonzero().flatten().tolist()) == expected[layer]


def test_what_memory_does_not_allow_runs_call_by_call(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    recorder = Spoiled(bytes_each=100)
    core = build(recorder, max_num_seqs=8, graph_memory_bytes=250)
    assert recorder.recorded == 3  # batches of 1, 2 and 4, no prompts
    layer_bench.add_all(core)
    assert layer_bench.drain(core) == layer_bench.alone


def test_deferred_recordings_are_made_by_the_steps_that_need_them(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    core = build(None)
    recorder = Spoiled()
    core._runner.repeat_with(recorder, EngineConfig(), max_model_len=core.max_model_len)
    core.warm_up(compiled=True)
    assert recorder.recorded == 0
    for _ in range(2):
        layer_bench.add_all(core)
        assert layer_bench.drain(core) == layer_bench.alone
        core.add(layer_bench.sequence("dense"), layer_bench.vision("dense"))
        assert layer_bench.drain(core) == {"dense": layer_bench.alone["dense"]}
    # batches of 8, and of 1 with the rest of its prompt behind a prefix
    assert recorder.recorded == 3
    assert recorder.steps == 4 * (layer_bench.new - 1) + 2 - 3


def test_when_memory_ends_while_recording_the_rest_runs_call_by_call(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    class Full(Spoiled):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            if self.recorded == 2:
                raise torch.OutOfMemoryError
            return super().record(work)

    core = build(recorder := Full(), max_num_seqs=8, cuda_graphs=False)
    layer_bench.add_all(core)
    assert layer_bench.drain(core) == layer_bench.alone
    assert recorder.recorded == 2


def test_a_request_without_finite_logits_fails_alone(
    layer_bench: Any, build: Callable[..., EngineCore]
) -> None:
    core = build(Spoiled(), prefix_cache=False)
    for name in ("one", "text"):
        core.add(layer_bench.sequence(name), layer_bench.vision(name))
    while len(core._scheduler.running) < 2:
        core.step()
    spoiled = core._scheduler.sequences["text"].table
    assert spoiled is not None
    for tensor in core.pool.gather(spoiled.blocks[0][:1], 4, layers=[0]):
        core.pool.scatter(spoiled.blocks[0][:1], [torch.full_like(tensor, torch.nan)], layers=[0])
    result = core.step()
    assert [failure.request_id for failure in result.failed] == ["text"]
    assert [token.request_id for token in result.tokens] == ["one"]


def test_steps_with_prompts_or_image_rows_are_not_taken(layer_bench: Any) -> None:
    core_like: dict[str, Any] = {"layer_group": (0,) * 5, "max_num_seqs": 4, "max_model_len": 64}
    pool: Any = SimpleNamespace(block_size=4, layer=lambda index: None)
    graphs = DecodeGraphs(layer_bench.decoder, pool, Spoiled(), **core_like)
    decoding = _chunk()
    assert not graphs.takes([decoding])  # nothing is recorded yet
    graphs.defer(0)
    assert graphs.takes([decoding])
    assert graphs.takes([_chunk(spans=[SimpleNamespace(start=0, stop=9)])])
    others = [
        _chunk(length=2), _chunk(samples=False), _chunk(dropped=(0, 1)),
        _chunk(spans=[SimpleNamespace(start=0, stop=10)]),
    ]  # fmt: skip
    for other in others:
        assert not graphs.takes([decoding, other])


def _chunk(*, spans: Any = (), length: int = 1, samples: bool = True, dropped: Any = ()) -> Any:
    sequence = SimpleNamespace(spans=spans, num_computed=9)
    return SimpleNamespace(sequence=sequence, length=length, samples=samples, dropped=dropped)


def test_shapes_hold_the_longest_group_of_the_longest_sequence(layer_bench: Any) -> None:
    pool: Any = SimpleNamespace(block_size=4, layer=lambda index: None)
    graphs = DecodeGraphs(
        layer_bench.decoder, pool, Spoiled(), layer_group=(0, 0, 0, 1, 1), max_num_seqs=8,
        max_model_len=5000,
    )  # fmt: skip

    def step(*lengths: list[int]) -> Any:
        return [
            SimpleNamespace(sequence=SimpleNamespace(table=SimpleNamespace(lengths=pair)))
            for pair in lengths
        ]

    assert graphs.shape(step([5, 3])) == DecodeShape(1, 1024)
    assert graphs.shape(step([1023, 3], [4, 4], [9, 9])) == DecodeShape(4, 1024)
    assert graphs.shape(step([1024, 3], [4, 4])) == DecodeShape(2, 4096)
    assert graphs.shape(step(*[[4999, 1]] * 7)) == DecodeShape(8, 5000)
