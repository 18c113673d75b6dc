"""Prompts of every size that matters, run once before the first request: kernels are compiled for
ranges of token counts, and nobody should wait for a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epd.kv.blocks import BlockTable, ImageSpan
from epd.request import SamplingParams
from epd.scheduler import Chunk
from epd.sequence import Sequence

if TYPE_CHECKING:
    from epd.config import EngineConfig
    from epd.kv.handoff import ModelFacts
    from epd.runner import ModelRunner
    from epd_pruning.layer_base import LayerPruner

__all__ = ["context_lengths", "token_counts", "warm_up"]

_NAME = "warm-up"
_IMAGE, _TEXT, _FEW, _MANY = 96, 32, 8, 256
_SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, seed=1),
)


def token_counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ..., multiples of 128 up to 1,024, and `most`, increasing.

    Launches change at some of these: tuned ones at powers of two and 640, rules by tiles of 128.
    """
    powers = [1 << n for n in range(most.bit_length())]
    counts = {*powers, *(3 * power for power in powers), *range(128, 1025, 128)}
    return sorted({min(count, most) for count in counts} | {most})


def context_lengths(longest: int) -> list[int]:
    """Powers of two from 256 up to `longest`: over them attention may split its work."""
    return [1 << n for n in range(8, longest.bit_length()) if 1 << n <= longest]


def warm_up(
    runner: ModelRunner, config: EngineConfig, facts: ModelFacts, pruner: LayerPruner | None, *,
    compiled: bool,
) -> None:  # fmt: skip
    """Compile and record what steps need, where `runner` repeats them.

    With `compiled` this process did it before: only recording is left, and waits for its step.
    """
    if runner.decode_graphs is None:
        return
    if compiled:
        runner.decode_graphs.defer(config.graph_memory_bytes)
        if runner.prompt_graphs is not None:
            runner.prompt_graphs.defer(config.graph_memory_bytes)
        return
    runner.decode_graphs.record(config.graph_memory_bytes)
    _run_prompts(runner, config, facts, pruner)
    if runner.prompt_graphs is not None:
        runner.prompt_graphs.record(config.graph_memory_bytes)


def _run_prompts(
    runner: ModelRunner, config: EngineConfig, facts: ModelFacts, pruner: LayerPruner | None
) -> None:
    """Run prompts that write no KV: of each size, sampled from, of images, and pruned if any is."""
    counts = token_counts(min(config.max_batched_tokens, facts.max_position - 1))
    steps = [[_prompt(count, config, facts)] for count in counts]
    longest = min(config.max_model_len or facts.max_position, facts.max_position)
    for total in context_lengths(longest):
        late = _prompt(_FEW, config, facts, past=total - _FEW)
        steps += [[late], [late, _prompt(_FEW, config, facts)]]
        if total > _MANY:
            steps.append([_prompt(_MANY, config, facts, past=total - _MANY)])
    steps.append([_prompt(_MANY, config, facts)] * 2)
    steps.append([_prompt(_FEW, config, facts, sampling) for sampling in _SAMPLINGS])
    steps.append([_picture(config, facts)])
    if pruner is not None:
        dropped = (0, *(_IMAGE - left for left in pruner.schedule.kept(_IMAGE)))
        steps.append([_picture(config, facts, dropped)])
    runner.hold_vision(_NAME, [torch.zeros(_IMAGE, runner.hidden_size)])
    for chunks in steps:
        runner.run(chunks)
    runner.drop_vision(_NAME)


def _prompt(
    length: int, config: EngineConfig, facts: ModelFacts,
    sampling: SamplingParams = _SAMPLINGS[0], *, past: int = 0,
) -> Chunk:  # fmt: skip
    """The last `length` tokens of a prompt without images. Block -1 stands for nowhere."""
    total = past + length
    sequence = Sequence(
        request_id=_NAME, attempt=0, tokens=[0] * total, num_prompt=total, sampling=sampling,
        table=_nowhere(past, length, config, facts), num_computed=past, next_pos=past,
    )  # fmt: skip
    # a single token that is sampled from would be a decode step
    return Chunk(sequence, length, length > 1)


def _nowhere(past: int, length: int, config: EngineConfig, facts: ModelFacts) -> BlockTable:
    blocks = [-1] * -(-(past + length) // config.block_size)
    lengths = [past] * facts.num_groups
    return BlockTable([list(blocks) for _ in range(facts.num_groups)], lengths)


def _picture(config: EngineConfig, facts: ModelFacts, dropped: tuple[int, ...] = ()) -> Chunk:
    """A prompt of one image, which loses `dropped` of its tokens before each layer group."""
    chunk = _prompt(_IMAGE + _TEXT, config, facts)
    chunk.sequence.spans = (ImageSpan(0, _IMAGE, _NAME),)
    return Chunk(chunk.sequence, chunk.length, True, dropped)
