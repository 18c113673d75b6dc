"""The studies' own arithmetic: what is compared, and what is written down as kept."""

from __future__ import annotations

import pytest
import torch

from epd.demo import CHECKPOINT
from epd.demo.examples import held_out
from epd.engine import LLM
from epd.quantize.pruning_study import _METHODS, Recorder, _measure, mean_jaccard
from epd.quantize.study import Answers, RememberedVision, compare
from epd_kernels.text_votes import Span, Spans
from epd_pruning.layer_base import LayerBatch


def test_overlap_is_intersection_over_union():
    one = [frozenset({1, 2, 3}), frozenset({5}), frozenset({0, 1})]
    other = [frozenset({2, 3, 4}), frozenset({5}), frozenset({2, 3})]
    assert mean_jaccard(one, other) == pytest.approx((2 / 4 + 1 + 0) / 3)
    assert mean_jaccard(one, one) == 1.0
    assert mean_jaccard([], []) is None


def test_same_tokens_are_counted_over_the_longer_answer():
    examples = held_out(2, 0)
    reference = Answers([[1, 2, 3], [4]], [examples[0].answer, "?"], 0)
    found = Answers([[1, 9], [4, 4]], [examples[0].answer, examples[1].answer], 0)
    measured = compare(found, reference, examples)
    assert measured.correct == 2
    assert measured.same_tokens == pytest.approx(2 / 5)


def test_the_recorder_names_vision_tokens_of_each_prompt():
    """Two prompts and a decoding row between them; rows of text and of others do not count."""

    class Fixed:
        def keep_rows(self, batch: LayerBatch, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            rows = torch.tensor([0, 2, 4, 5, 6, 7, 10])
            return rows, batch.is_vision[rows]

    is_vision = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    spans = (Span(0, 1, 0, 5, 1, 0), Span(1, 0, 5, 6, 0, 3), Span(2, 1, 6, 11, 2, 4))
    empty = torch.zeros(0, 1, 1)
    batch = LayerBatch(queries=empty, keys=empty, is_vision=is_vision, num_vision=(3, 0, 4),
                       spans=Spans.of(spans, "cpu"), scale=1.0)  # fmt: skip
    recorder = Recorder(Fixed())  # type: ignore[arg-type]
    recorder.keep_rows(batch, 7)
    assert recorder.kept == [{1}, {0, 1}]


@pytest.mark.slow
def test_methods_keep_what_their_budget_says():
    """A layer processes the budget on average: three layers see what enters, four what is kept."""
    examples = held_out(1, 3)
    llm = LLM(CHECKPOINT)
    vision, tokens = RememberedVision(llm.vision), llm.card.image_tokens * len(examples[0].images)
    kept = {
        name: len(_measure(CHECKPOINT, _METHODS[name], examples, vision, "cpu")[0][0])
        for name in ("dpp", "dpp+adaptinfer[2]")
    }
    assert kept["dpp"] == tokens // 4
    entering = round(0.3 * tokens)
    assert abs((3 * entering + 4 * kept["dpp+adaptinfer[2]"]) / 7 - 0.25 * tokens) <= 1
