"""Layer pruning among others in a step: whatever runs beside a request, it answers as alone."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from epd.core import EngineCore
from epd.kv.handoff import KVHandoff
from epd_pruning import available


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
def test_a_mixed_batch_equals_each_alone(layer_bench: Any, settings: dict[str, Any]):
    core = layer_bench.core(**settings)
    for _ in range(2):  # the second time with a warm prefix cache
        layer_bench.add_all(core)
        assert layer_bench.drain(core) == layer_bench.alone


def test_prompts_join_those_who_decode(layer_bench: Any):
    core = layer_bench.core()
    found: dict[str, list[int]] = {}
    for name in layer_bench.cases:
        core.add(layer_bench.sequence(name), layer_bench.vision(name))
        for _ in range(2):
            for token in core.step().tokens:
                found.setdefault(token.request_id, []).append(token.output.token_id)
    for name, tokens in layer_bench.drain(core, found).items():
        assert tokens == layer_bench.alone[name]


@pytest.mark.parametrize("num_blocks", [24, 36])
def test_preemption_changes_no_token(layer_bench: Any, num_blocks: int):
    core = layer_bench.core(num_blocks=num_blocks)
    layer_bench.add_all(core)
    assert layer_bench.drain(core) == layer_bench.alone
    assert core.stats().preemptions > 0


@pytest.mark.parametrize("done", [1, 17])
def test_a_retry_chooses_by_the_prompt_alone(layer_bench: Any, done: int):
    core = layer_bench.core()
    for name in layer_bench.cases:
        core.add(
            layer_bench.sequence(name, output_token_ids=layer_bench.alone[name][:done]),
            layer_bench.vision(name),
        )
    found: dict[str, list[int]] = {
        name: answer[:done] for name, answer in layer_bench.alone.items()
    }
    assert layer_bench.drain(core, found) == layer_bench.alone


def test_handoff_moves_each_group_at_its_length(layer_bench: Any):
    prefill, decode = layer_bench.core(), layer_bench.core(block_size=8)
    layer_bench.add_all(prefill, handoff=True)
    found: dict[str, list[int]] = {}
    while prefill.has_work() or decode.has_work():
        result = prefill.step()
        for token in [*result.tokens, *decode.step().tokens]:
            found.setdefault(token.request_id, []).append(token.output.token_id)
        for name in result.handoffs:
            data = msgspec.msgpack.encode(prefill.offer(name))
            handoff = msgspec.msgpack.decode(data, type=KVHandoff)
            assert handoff.kv_lengths == layer_bench.lengths(name, 1)
            tensors = prefill.export_kv(name)
            assert [t.shape[1] for t in tensors] == [
                handoff.kv_lengths[g] for g in layer_bench.groups
            ]
            assert decode.reserve(handoff, 0, None)
            decode.import_kv(name, tensors)
            prefill.release(name)
        prefill.check()
        decode.check()
    assert found == layer_bench.alone
    for core in (prefill, decode):
        assert core.stats().blocks_free == core.stats().blocks_total


def test_one_picture_two_questions_two_budgets_interleaved(layer_bench: Any):
    """Nothing of one answer enters another: each equals a run in a core of its own."""
    questions = ["a @ what is it", "a @ what was it"]
    wanted: dict[str, list[int]] = {}
    asked: list[tuple[str, str, int | None]] = [
        (f"{text}/{keep}", text, keep) for text in questions for keep in (5, 9, None)
    ]

    def ask(core: EngineCore, name: str, text: str, keep: int | None) -> list[int]:
        sequence = layer_bench.sequence(
            "one", request_id=name, prompt_token_ids=layer_bench.tokenise(text), layer_keep=keep
        )
        core.add(sequence, layer_bench.images[:1])
        return layer_bench.drain(core)[name]

    for one in asked:
        wanted[one[0]] = ask(layer_bench.core(block_size=2), *one)
    assert len({tuple(answer) for answer in wanted.values()}) == len(asked)
    warm = layer_bench.core(block_size=2)
    for order in (asked, asked[::-1], asked[3:] + asked[:3]):
        for one in order:
            assert ask(warm, *one) == wanted[one[0]]
    assert warm.stats().prefix_hits > 0  # the dense ones share


def test_usage_and_groups(layer_bench: Any):
    core = layer_bench.core()
    assert core.facts.layer_group == layer_bench.groups
    core.add(layer_bench.sequence("gaps"), layer_bench.vision("gaps"))
    (done,) = core.step().prefilled
    assert (done.image_tokens, done.image_tokens_before) == (
        len(layer_bench.gaps),
        layer_bench.size,
    )
    assert done.prompt_tokens == layer_bench.lengths("gaps", 1)[0]


class NoReadBack(TorchDispatchMode):
    """Raises where the host would wait for a value, or for a size, that a device computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean = any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if func is torch.ops.aten.index.Tensor else ())
        )
        if boolean or func.overloadpacket in (
            torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
            torch.ops.aten.masked_select, torch.ops.aten._unique2,
        ):  # fmt: skip
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", available("layer"))
def test_choosing_never_waits_for_the_device(
    layer_bench: Any, method: str, monkeypatch: pytest.MonkeyPatch
):
    core = layer_bench.core(layer_bench.pruner(method))
    stages = core._runner._stages
    assert stages is not None
    survivors, calls = stages._survivors, []

    def watched(*args: Any) -> Any:
        with NoReadBack():
            calls.append(survivors(*args))
        return calls[-1]

    monkeypatch.setattr(stages, "_survivors", watched)
    layer_bench.add_all(core)
    assert not core.step().failed
    assert len(calls) == len(layer_bench.layers)
    with NoReadBack(), pytest.raises(AssertionError, match="waits"):
        torch.ones(2).sum().item()


@pytest.mark.parametrize("seed", range(4))
def test_random_lives_lose_no_block_and_no_token(layer_bench: Any, seed: int):
    """Arrivals, cancels and moves in any order, in cores too small for everybody."""
    dice = random.Random(seed)
    settings = {"num_blocks": 40, "max_batched_tokens": dice.choice([24, 64]), "max_num_seqs": 4}
    prefill, decode = layer_bench.core(**settings), layer_bench.core(**settings)
    found: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    offers: list[str] = []
    todo = [f"{name}/{copy}" for name in layer_bench.cases for copy in range(3)]
    dice.shuffle(todo)

    def add(name: str) -> None:
        case = name.partition("/")[0]
        sequence = layer_bench.sequence(
            case, request_id=name, handoff=dice.random() < 0.5,
            output_token_ids=found.setdefault(name, []).copy(),
        )  # fmt: skip
        prefill.add(sequence, layer_bench.vision(case))

    for _ in range(4000):
        if not (todo or offers or prefill.has_work() or decode.has_work()):
            break
        if todo and dice.random() < 0.3:
            add(todo.pop())
        if dice.random() < 0.03 and found:
            victim = dice.choice(sorted(found))
            cancelled.add(victim)
            prefill.cancel(victim)
            decode.cancel(victim)
            offers = [name for name in offers if name != victim]
        for name in offers[:1]:
            if decode.reserve(prefill.offer(name), 0, None):
                decode.import_kv(name, prefill.export_kv(name))
                prefill.release(name)
                offers.remove(name)
        for core in (prefill, decode):
            result = core.step()
            assert not result.failed
            core.check()
            for token in result.tokens:
                assert token.output.index == len(found[token.request_id])
                found[token.request_id].append(token.output.token_id)
            offers += result.handoffs
            for name in result.evicted:
                add(name)
    else:
        raise AssertionError("somebody never finishes")
    for name, tokens in found.items():
        wanted = layer_bench.alone[name.partition("/")[0]]
        assert tokens == (wanted[: len(tokens)] if name in cancelled else wanted)
    assert len(found) == 3 * len(layer_bench.cases) > len(cancelled)
    for core in (prefill, decode):
        stats = core.stats()
        assert (stats.waiting, stats.running, stats.reserved, stats.held) == (0, 0, 0, 0)
        assert stats.blocks_free == stats.blocks_total
