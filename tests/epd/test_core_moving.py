"""Answers that move between cores in the middle: same tokens, whatever layers hold and however they
are sampled.
"""

from __future__ import annotations

from typing import Any

import pytest

from epd.core import EngineCore
from epd.request import SamplingParams, TokenOutput

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.1, "top_k": 40, "seed": 9},
    "penalised": {
        "temperature": 0.9, "seed": 3, "repetition_penalty": 1.4, "presence_penalty": 0.6,
        "frequency_penalty": 0.3,
    },
    "with log-probabilities": {"logprobs": 4},
}  # fmt: skip


def collect(core: EngineCore, found: list[TokenOutput], steps: int) -> None:
    for _ in range(steps):
        if core.has_work():
            result = core.step()
            assert not result.failed
            found += [token.output for token in result.tokens]
            core.check()


def hop(source: EngineCore, target: EngineCore, name: str) -> list[int]:
    """Move a request; the KV lengths that travelled."""
    handoff, deadline = source.hold(name)
    assert target.reserve(handoff, 0, deadline)
    target.import_kv(name, source.export_kv(name))
    source.release(name)
    source.check()
    assert source.stats().blocks_free == source.stats().blocks_total
    return handoff.kv_lengths


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("case", ["one", "two", "dense", "text", "gaps"])
def test_an_answer_that_moves_twice_is_the_one_that_stays(
    layer_bench: Any, case: str, sampling: str
) -> None:
    params = SamplingParams(max_tokens=layer_bench.new, ignore_eos=True, **SAMPLINGS[sampling])
    alone: list[TokenOutput] = []
    core = layer_bench.core(prefix_cache=False)
    core.add(layer_bench.sequence(case, sampling=params), layer_bench.vision(case))
    collect(core, alone, 100)
    assert [token.index for token in alone] == list(range(layer_bench.new))

    first, second = (layer_bench.core(prefix_cache=False) for _ in range(2))
    moved: list[TokenOutput] = []
    first.add(layer_bench.sequence(case, sampling=params), layer_bench.vision(case))
    for source, target in ((first, second), (second, first)):
        collect(source, moved, 9)
        lengths = hop(source, target, case)
        assert lengths == layer_bench.lengths(case, len(moved))
    collect(first, moved, 100)
    assert moved == alone


def test_only_what_decodes_here_with_all_its_kv_can_be_held(layer_bench: Any) -> None:
    core = layer_bench.core(max_batched_tokens=16)
    with pytest.raises(KeyError):
        core.hold("one")
    core.add(layer_bench.sequence("dense"), layer_bench.vision("dense"))
    with pytest.raises(KeyError):
        core.hold("dense")  # it waits
    core.step()
    with pytest.raises(KeyError):
        core.hold("dense")  # half of the prompt is computed
    collect(core, [], 4)
    handoff, _ = core.hold("dense")
    assert handoff.num_tokens - 1 == handoff.kv_lengths[0]
    with pytest.raises(KeyError):
        core.hold("dense")  # it is held
    other = layer_bench.core()
    assert other.reserve(handoff, 0, None)
    with pytest.raises(KeyError):
        other.hold("dense")  # its KV is not here


def test_a_preempted_answer_cannot_be_held(layer_bench: Any) -> None:
    core = layer_bench.core(num_blocks=16, prefix_cache=False)
    names = ["dense", "text"]
    for name in names:
        core.add(layer_bench.sequence(name), layer_bench.vision(name))
    for _ in range(100):
        core.step()
        if core.stats().waiting:
            break
    assert core.stats().preemptions == 1
    with pytest.raises(KeyError):
        core.hold("text")


def test_a_held_answer_keeps_its_deadline(layer_bench: Any) -> None:
    core = layer_bench.core()
    core.add(layer_bench.sequence("text", deadline=1e9), [])
    collect(core, [], 3)
    assert core.hold("text")[1] == 1e9
    assert core.find(lambda sequence: sequence.prefilled) == [("text", 0)]
    core.cancel("text")
    assert core.find(lambda _: True) == []
