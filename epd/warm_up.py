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

__all__ = ["token_counts", "warm_up"]

_NAME = "warm-up"
_IMAGE, _TEXT = 96, 32
_SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, seed=1),
)


def token_counts(most: int) -> list[int]:
    """Powers of two, multiples of 128 up to 1,024 between them, and `most`, increasing.

    Launches change at these: tuned ones at powers of two and 640, rules by tiles of 128 tokens.
    """
    counts = {1 << n for n in range(most.bit_length())} | set(range(128, 1025, 128))
    return sorted({min(count, most) for count in counts} | {most})


def warm_up(
    runner: ModelRunner, config: EngineConfig, facts: ModelFacts, pruner: LayerPruner | None
) -> None:
    """Compile and record what steps need, where `runner` repeats them."""
    if runner.decode_graphs is None:
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
    steps.append([_prompt(8, config, facts, sampling) for sampling in _SAMPLINGS])
    steps.append([_picture(config, facts)])
    if pruner is not None:
        dropped = (0, *(_IMAGE - left for left in pruner.schedule.kept(_IMAGE)))
        steps.append([_picture(config, facts, dropped)])
    runner.hold_vision(_NAME, [torch.zeros(_IMAGE, runner.hidden_size)])
    for chunks in steps:
        runner.run(chunks)
    runner.drop_vision(_NAME)


def _prompt(
    length: int, config: EngineConfig, facts: ModelFacts, sampling: SamplingParams = _SAMPLINGS[0]
) -> Chunk:
    """A prompt without images. Block -1 stands for nowhere."""
    sequence = Sequence(
        request_id=_NAME, attempt=0, tokens=[0] * length, num_prompt=length, sampling=sampling,
        table=_nowhere(length, config, facts),
    )  # fmt: skip
    # a single token that is sampled from would be a decode step
    return Chunk(sequence, length, length > 1)


def _nowhere(length: int, config: EngineConfig, facts: ModelFacts) -> BlockTable:
    blocks = [-1] * -(-length // config.block_size)
    return BlockTable([list(blocks) for _ in range(facts.num_groups)], [0] * facts.num_groups)


def _picture(config: EngineConfig, facts: ModelFacts, dropped: tuple[int, ...] = ()) -> Chunk:
    """A prompt of one image, which loses `dropped` of its tokens before each layer group."""
    chunk = _prompt(_IMAGE + _TEXT, config, facts)
    chunk.sequence.spans = (ImageSpan(0, _IMAGE, _NAME),)
    return Chunk(chunk.sequence, chunk.length, True, dropped)
