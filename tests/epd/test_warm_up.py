"""What is run before the first request, and that it leaves no trace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epd.config import EngineConfig
from epd.core import EngineCore
from epd.graphs import CalledAgain
from epd.runner import ModelRunner
from epd.warm_up import context_lengths, token_counts


def test_counts_reach_every_launch() -> None:
    counts = token_counts(2048)
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (1, 2048)
    assert {16, 24, 32, 64, 128, 256, 512, 640, 896, 1024, 1536} <= set(counts)
    assert token_counts(700)[-2:] == [640, 700]
    assert token_counts(1) == [1]
    assert context_lengths(4096) == [256, 512, 1024, 2048, 4096]
    assert context_lengths(5000)[-1] == 4096
    assert context_lengths(200) == []


@pytest.mark.parametrize("kv", ["bf16", "int4"])
def test_it_runs_prompts_of_every_kind_and_leaves_no_trace(
    layer_bench: Any, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card: Any = SimpleNamespace(
        revision="r1", eos_token_ids=(2,), max_position=600, path=Path("absent")
    )
    core = EngineCore(
        layer_bench.decoder, card, device="cpu", layer_pruner=layer_bench.pruner(),
        config=EngineConfig(block_size=4, num_blocks=160, max_batched_tokens=300, kv=kv),
        recorder=CalledAgain("cpu"),
    )  # fmt: skip
    seen: list[tuple[list[int], int, bool, bool]] = []
    real = ModelRunner.run

    def note(self: ModelRunner, chunks: Any) -> Any:
        lengths = [chunk.length for chunk in chunks]
        past, spans = chunks[0].sequence.num_computed, chunks[0].sequence.spans
        seen.append((lengths, past, bool(spans), any(chunk.dropped for chunk in chunks)))
        return real(self, chunks)

    monkeypatch.setattr(ModelRunner, "run", note)
    before = [tensor.clone() for tensor in core.pool.gather(range(160), 640)]
    core.warm_up()
    after = core.pool.gather(range(160), 640)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    alone = [([count], 0, False, False) for count in token_counts(300)]
    assert seen[: len(alone)] == alone
    behind = [(past + lengths[0], len(lengths)) for lengths, past, _, _ in seen if past]
    assert behind == [(256, 1), (256, 2), (512, 1), (512, 2), (512, 1)]
    assert [256, 256] in [lengths for lengths, *_ in seen]
    assert {(image, dropped) for _, _, image, dropped in seen} == {
        (False, False), (True, False), (True, True)
    }  # fmt: skip
    assert core.stats().blocks_free == 160 and not core.has_work()


def test_nothing_is_run_where_nothing_is_compiled(
    layer_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = layer_bench.core()
    monkeypatch.setattr(ModelRunner, "run", lambda *_: pytest.fail("a CPU has no need"))
    core.warm_up()
