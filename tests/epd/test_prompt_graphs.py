"""Steps with prompts as recordings, replayed on a CPU by a twin that spoils its buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from epd.core import EngineCore
from epd.prompt_graphs import prompt_sizes, sequence_counts
from epd.runner import ModelRunner
from epd.step_arrays import step_arrays

from .recorded import Spoiled, core_maker


@pytest.fixture
def build(layer_bench: Any) -> Callable[..., EngineCore]:
    return core_maker(layer_bench)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The count of tokens of each step that runs without a recording."""
    seen: list[int] = []
    real = ModelRunner._forward

    def count(self: ModelRunner, chunks: Any, step: Any) -> torch.Tensor:
        seen.append(len(step.ids))
        return real(self, chunks, step)

    monkeypatch.setattr(ModelRunner, "_forward", count)
    return seen


def test_only_pruned_prompts_run_without_a_recording(
    layer_bench: Any, build: Callable[..., EngineCore], eager: list[int]
) -> None:
    core, expected = build(recorder := Spoiled()), layer_bench.alone
    eager.clear()
    core.add(layer_bench.sequence("two"), layer_bench.vision("two"))
    assert layer_bench.drain(core) == {"two": expected["two"]}
    assert (len(eager), recorder.steps) == (1, layer_bench.new - 1)  # pruned, hence not recorded
    core.add(layer_bench.sequence("dense"), layer_bench.vision("dense"))
    assert layer_bench.drain(core) == {"dense": expected["dense"]}
    assert (len(eager), recorder.steps) == (1, 2 * layer_bench.new - 1)


@pytest.mark.parametrize(("budget", "seqs"), [(20, 3), (64, 9), (2048, 5), (2048, 100)])
@pytest.mark.parametrize("kv", ["bf16", "int4"])
def test_prompts_beside_decoding_sequences_are_recorded_too(
    layer_bench: Any, build: Callable[..., EngineCore], eager: list[int], budget: int, seqs: int,
    kv: str,
) -> None:  # fmt: skip
    answers = []
    for recorder in (None, Spoiled()):
        core = build(recorder, max_batched_tokens=budget, max_num_seqs=seqs, kv=kv)
        eager.clear()
        found: dict[str, list[int]] = {}
        for wave in range(3):  # each finds the one before decoding
            for name in layer_bench.cases:
                sequence = layer_bench.sequence(name, layer_keep=None)
                sequence = dataclasses.replace(sequence, request_id=f"{name}-{wave}")
                core.add(sequence, layer_bench.vision(name))
            for _ in range(3):
                for token in core.step().tokens:
                    found.setdefault(token.request_id, []).append(token.output.token_id)
        layer_bench.drain(core, found)
        core.check()
        answers.append(found)
    assert answers[0] == answers[1] and len(answers[0]) == 3 * len(layer_bench.cases)
    assert all(tokens > prompt_sizes(budget)[-1] for tokens in eager)


@pytest.mark.parametrize("budget", [7, 20, 2048])
def test_lone_prompts_in_pieces_or_whole_give_the_eager_tokens(
    layer_bench: Any, build: Callable[..., EngineCore], budget: int
) -> None:
    core = build(recorder := Spoiled(), max_batched_tokens=budget)
    for name in ("dense", "text", "dense"):  # the last one finds a prefix
        before = recorder.steps
        core.add(layer_bench.sequence(name, layer_keep=None), layer_bench.vision(name))
        expected = layer_bench.alone[name]
        assert layer_bench.drain(core) == {name: expected}
        # at least the piece of the prompt that samples, if 16 tokens fit a step
        assert recorder.steps - before == layer_bench.new - (budget < 16)


@pytest.mark.parametrize("kv", ["bf16", "int4"])
def test_logits_of_a_padded_prompt_are_those_of_the_prompt(
    layer_bench: Any, build: Callable[..., EngineCore], kv: str
) -> None:
    seen: list[torch.Tensor] = []
    for recorder in (None, Spoiled()):
        core = build(recorder, kv=kv)
        runner = core._runner
        core.add(layer_bench.sequence("dense"), layer_bench.vision("dense"))
        chunks = core._scheduler.schedule().chunks
        with torch.inference_mode():
            arrays = step_arrays(chunks, num_groups=3, block_size=4, steady=recorder is not None)
            if runner.prompt_graphs is None:
                hidden = runner._forward(chunks, step := arrays.send(torch.device("cpu")))
                seen.append(layer_bench.decoder.logits(hidden[step.last]))
            else:
                assert runner.prompt_graphs.takes(chunks)
                vision = runner._vision_rows(arrays.images)
                seen.append(runner.prompt_graphs.run(arrays, vision)[0].clone())
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-4)


def test_sizes_of_prompts_waste_little() -> None:
    assert prompt_sizes(15) == []
    assert prompt_sizes(200) == [16, 32, 64, 128, 192]
    assert prompt_sizes(10**6)[-4:] == [640, 768, 896, 1024]
    for length in range(65, 1025):
        waste = next(n for n in prompt_sizes(2048) if n >= length) - length
        assert waste < (64 if length <= 512 else 128)
    assert [sequence_counts(n) for n in (1, 6, 8, 9)] == [[1], [1, 6], [1, 8], [1, 8, 9]]
    assert sequence_counts(256) == [1, 8, 32, 64]
