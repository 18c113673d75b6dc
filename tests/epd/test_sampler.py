"""The sampler against closed forms, brute force and transformers' own logits processors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epd.request import SamplingParams
from epd.sampler import SampleRow, apply_penalties, keep_counts, sample, uniform


def row(
    params: SamplingParams | None = None, tokens: list[int] | None = None, num_prompt: int = 1,
    **fields: Any,
) -> SampleRow:  # fmt: skip
    return SampleRow(params or SamplingParams(**fields), tokens or [0] * num_prompt, num_prompt)


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def ids(logits: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    outputs = sample(logits.clone(), rows)
    assert all(output is not None for output in outputs)
    return [output.token_id for output in outputs if output is not None]


def test_greedy_takes_the_best_whatever_else_is_in_the_batch():
    logits = noise(9, 300)
    alone = [ids(logits[i : i + 1], [row()])[0] for i in range(9)]
    assert alone == logits.argmax(-1).tolist()
    mixed = [row() if i % 2 else row(temperature=1.0, seed=i) for i in range(9)]
    assert [t for i, t in enumerate(ids(logits, mixed)) if i % 2] == alone[1::2]


def test_tokens_found_already_are_taken_unless_somebody_is_drawn_or_penalised():
    logits, found = noise(2, 50), torch.tensor([7, -1])
    first, second = sample(logits.clone(), [row(), row()], best=found)
    assert first is not None and first.token_id == 7 and second is None
    for other in (row(temperature=1.0), row(presence_penalty=0.5)):
        first, second = sample(logits.clone(), [row(), other], best=found)
        assert first is not None and first.token_id == int(logits[0].argmax())
        assert second is not None


def test_a_draw_is_the_same_alone_and_in_any_batch():
    logits = noise(7, 200)
    rows = [
        row(temperature=0.5 + i / 4, top_k=i * 9, top_p=1.0 - i / 10, min_p=i / 50, seed=i,
            num_prompt=3, tokens=[1, 2, 3] + [5] * i)
        for i in range(7)
    ]  # fmt: skip
    together = ids(logits, rows)
    assert together == [ids(logits[i : i + 1], [rows[i]])[0] for i in range(7)]
    order = [4, 0, 6, 1]
    assert [together[i] for i in order] == ids(logits[order], [rows[i] for i in order])


def test_the_index_of_an_output_counts_earlier_attempts():
    logits = noise(1, 50)
    (output,) = sample(logits, [row(tokens=[1, 2, 3, 4, 5], num_prompt=2)])
    assert output is not None
    assert output.index == 3


def test_uniform_is_a_fixed_function():
    """Pinned: a change would alter every seeded answer between two versions of a deployment."""
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform(1, 0) != uniform(0, 1)
    assert uniform((1 << 63) - 1, 1 << 20) < 1.0


def test_uniform_is_uniform():
    values = sorted(uniform(seed, index) for seed in range(100) for index in range(50))
    assert values[0] >= 0
    # Kolmogorov-Smirnov at significance 1e-4
    gap = max(abs(value - (i + 0.5) / 5000) for i, value in enumerate(values))
    assert gap < 2.23 / math.sqrt(5000)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"temperature": 1.0}, 6),
        ({"temperature": 0.5}, 6),
        ({"temperature": 2.0, "top_k": 4}, 4),
        ({"temperature": 1.0, "top_p": 0.8}, 3),
        ({"temperature": 1.0, "min_p": 0.2}, 4),
    ],
)
def test_draws_follow_the_distribution(fields: dict[str, Any], kept: int):
    probs = torch.tensor([0.4, 0.3, 0.12, 0.1, 0.05, 0.03])
    order = torch.tensor([3, 0, 5, 1, 4, 2])  # so that rank and token id differ
    logits = torch.empty(6)
    logits[order] = probs.log()
    rows = [row(seed=i % 50, num_prompt=1, tokens=[0] * (1 + i // 50), **fields)
            for i in range(6000)]  # fmt: skip
    drawn = torch.tensor(ids(logits.expand(6000, 6), rows))
    wanted = (probs.double() ** (1 / fields["temperature"]))[:kept]
    counts = torch.stack([(drawn == token).sum() for token in order])
    assert counts[kept:].sum() == 0
    # 99.99 % quantiles of chi-square with kept - 1 degrees of freedom
    limit = {3: 18.4, 4: 21.1, 6: 25.7}[kept]
    assert chi_square(counts[:kept], wanted / wanted.sum()) < limit


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = noise(20, 40, seed=1)
    rows = [row(temperature=0.9, top_p=0.9, seed=i) for i in range(20)]
    for i, token in enumerate(ids(logits, rows)):
        probs = torch.softmax(logits[i].double() / 0.9, -1)
        ranked = sorted(range(40), key=lambda t: -probs[t])
        kept, mass = [], 0.0
        for candidate in ranked:
            if mass >= 0.9:
                break
            kept.append(candidate)
            mass += float(probs[candidate])
        point, reached = uniform(i, 0) * mass, 0.0
        for candidate in kept:
            reached += float(probs[candidate])
            if reached > point:
                break
        assert token == candidate


WARPERS = {
    "top_k": ("TopKLogitsWarper", "top_k"),
    "top_p": ("TopPLogitsWarper", "top_p"),
    "min_p": ("MinPLogitsWarper", "min_p"),
}


def kept_by_transformers(scores: torch.Tensor, **limits: float) -> list[int]:
    process = pytest.importorskip("transformers.generation.logits_process")
    for name, value in limits.items():
        cls, argument = WARPERS[name]
        scores = getattr(process, cls)(**{argument: value})(torch.zeros(1, 1).long(), scores)
    return scores.isfinite().sum(-1).tolist()


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 1}, {"top_k": 7}, {"top_k": 1000}, {"top_p": 0.05}, {"top_p": 0.5},
        {"top_p": 0.95}, {"min_p": 0.01}, {"min_p": 0.3}, {"min_p": 1.0},
        {"top_k": 9, "top_p": 0.7}, {"top_k": 30, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_what_is_kept_equals_transformers(limits: dict[str, Any], temperature: float):
    scores = noise(16, 120, seed=4) / temperature
    ranked = torch.softmax(scores.double(), -1).sort(-1, descending=True).values
    count = keep_counts(
        ranked,
        top_k=torch.full((16,), int(limits.get("top_k", 0))),
        top_p=torch.full((16,), float(limits.get("top_p", 1.0)), dtype=torch.float64),
        min_p=torch.full((16,), float(limits.get("min_p", 0.0)), dtype=torch.float64),
    )
    assert count.tolist() == kept_by_transformers(scores.double(), **limits)


def test_top_k_keeps_exactly_k_of_equal_tokens():
    rows = [row(temperature=1.0, top_k=3, seed=i) for i in range(300)]
    assert set(ids(torch.zeros(300, 10), rows)) == {0, 1, 2}


def test_min_p_keeps_the_tokens_that_equal_its_bound():
    rows = [row(temperature=1.0, min_p=1.0, seed=i) for i in range(300)]
    logits = torch.tensor([0.0, 2.0, 1.9, 2.0]).expand(300, 4)
    assert set(ids(logits, rows)) == {1, 3}


def test_a_tiny_temperature_is_greedy():
    logits = noise(8, 100)
    rows = [row(temperature=1e-6, seed=i) for i in range(8)]
    assert ids(logits, rows) == logits.argmax(-1).tolist()


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((400, 6), -math.inf)
    logits[:, 2] = 0.0
    logits[:, 4] = 1.0
    rows = [row(temperature=2.0, seed=i) for i in range(400)]
    assert set(ids(logits, rows)) == {2, 4}


def test_repetition_penalty_equals_transformers():
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = noise(3, 30)
    tokens = [[1, 2, 2, 9], [5, 5, 5, 29], [0, 7, 8, 3]]
    rows = [row(tokens=t, num_prompt=2, repetition_penalty=1.7) for t in tokens]
    wanted = process.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(tokens), logits.clone())
    apply_penalties(logits, rows, range(3))
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 15), min_size=1, max_size=30),
    num_prompt=st.integers(1, 10),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 3.0]),
    presence=st.sampled_from([0.0, -1.5, 0.7]),
    frequency=st.sampled_from([0.0, -0.4, 1.1]),
)
def test_penalties_equal_their_definition(
    tokens: list[int], num_prompt: int, repetition: float, presence: float, frequency: float
):
    num_prompt = min(num_prompt, len(tokens))
    logits = noise(2, 12, seed=len(tokens))  # ids 12 to 15 lie outside: ignored
    params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence,
                            frequency_penalty=frequency)  # fmt: skip
    wanted = logits.clone()
    for token in range(12):
        value = float(wanted[1, token])
        if token in tokens:
            value = value / repetition if value > 0 else value * repetition
        count = tokens[num_prompt:].count(token)
        wanted[1, token] = value - frequency * count - presence * (count > 0)
    apply_penalties(logits, [row(), row(params, tokens, num_prompt)], [1])
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=1e-6)


def test_penalties_reach_the_choice():
    logits = torch.tensor([[2.0, 1.9, 0.0]] * 2)
    rows = [row(tokens=[0, 0], num_prompt=1, presence_penalty=0.5), row(tokens=[0, 0])]
    assert ids(logits, rows) == [1, 0]


def test_logprobs_are_those_of_the_model():
    logits = noise(4, 25)
    wanted = torch.log_softmax(logits, -1)
    rows = [
        row(logprobs=3),
        row(),
        row(logprobs=0, temperature=1.0, seed=3),
        row(logprobs=5, tokens=[1, 7, 7], repetition_penalty=4.0, presence_penalty=2.0),
    ]
    first, second, third, fourth = sample(logits.clone(), rows)
    assert first is not None
    assert second is not None
    assert third is not None
    assert fourth is not None
    assert (second.logprob, second.top) == (None, [])
    for i, output, count in ((0, first, 3), (2, third, 0), (3, fourth, 5)):
        assert output.logprob == pytest.approx(float(wanted[i, output.token_id]), abs=1e-5)
        best = wanted[i].topk(count)
        assert [token for token, _ in output.top] == best.indices.tolist()
        assert [value for _, value in output.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_more_logprobs_than_tokens_gives_all():
    (output,) = sample(noise(1, 4), [row(logprobs=20)])
    assert output is not None
    assert len(output.top) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gives_nothing_and_harms_nobody(bad: float, temperature: float):
    logits = noise(3, 20)
    rows = [row(temperature=temperature, seed=i, logprobs=1) for i in range(3)]
    healthy = sample(logits.clone(), rows)
    logits[1, 5] = bad
    outputs = sample(logits.clone(), rows)
    assert outputs[1] is None
    assert (outputs[0], outputs[2]) == (healthy[0], healthy[2])
