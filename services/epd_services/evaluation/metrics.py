"""Scores of a pruned run beside the dense run on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from epd_services.evaluation.questions import reads_text

__all__ = ["Score", "accuracy", "accuracy_by_type", "fails_text", "score", "text_accuracy"]

RESAMPLES = 2000
_AT_ONCE = 200

Right = Sequence[bool]


@dataclass(frozen=True, slots=True)
class Score:
    """`relative` is exact match over that of the dense run, `low` to `high` its 95 % interval.

    Flips count questions: `lost` were right dense and are wrong pruned, `won` the other way round.
    """

    exact: float
    by_type: dict[str, float]
    relative: float
    low: float
    high: float
    lost: int
    won: int


def score(right: Right, dense: Right, types: Sequence[str], *, seed: int) -> Score:
    """How a run did beside the dense one, question by question."""
    low, high = _interval(right, dense, seed=seed)
    pairs = list(zip(dense, right, strict=True))
    return Score(
        exact=accuracy(right),
        by_type=accuracy_by_type(right, types),
        relative=_ratio(sum(right), sum(dense)),
        low=low,
        high=high,
        lost=pairs.count((True, False)),
        won=pairs.count((False, True)),
    )


def accuracy(right: Right) -> float:
    """Share of right answers; nan of none."""
    return sum(right) / len(right) if right else float("nan")


def accuracy_by_type(right: Right, types: Sequence[str]) -> dict[str, float]:
    """The share of right answers of every type, in order of first appearance."""
    groups: dict[str, list[bool]] = {}
    for kind, hit in zip(types, right, strict=True):
        groups.setdefault(kind, []).append(hit)
    return {kind: accuracy(hits) for kind, hits in groups.items()}


def text_accuracy(right: Right, types: Sequence[str]) -> float | None:
    """The share of right answers to questions that read; None if nothing reads."""
    hits = [hit for kind, hit in zip(types, right, strict=True) if reads_text(kind)]
    return accuracy(hits) if hits else None


def fails_text(text: float | None, random: float | None) -> bool | None:
    """Whether a method reads worse than random tokens do; None if that was not measured."""
    return None if text is None or random is None else text < random


def _interval(right: Right, dense: Right, *, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the relative score: questions are drawn again, in pairs."""
    hits = np.array([right, dense], dtype=np.float64)
    generator, count = np.random.default_rng(seed), hits.shape[1]
    ratios: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    for _ in range(RESAMPLES // _AT_ONCE):
        drawn = hits[:, generator.integers(count, size=(_AT_ONCE, count))].sum(2)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(drawn[0] / drawn[1])
    low, high = np.nanpercentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
