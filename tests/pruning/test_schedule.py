"""Schedules and what they really cost, against the closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd_pruning.accounting import DecoderShape, count_tokens, kv_bytes, prefill_macs
from epd_pruning.adaptinfer import AdaptInfer
from epd_pruning.errors import PruningError
from epd_pruning.layer_rivals import FastV, PyramidDrop
from epd_pruning.schedule import Schedule, fit_average, fit_like
from epd_pruning.sparsevlm import SparseVLM

LLAVA_7B = DecoderShape(32, 4096, 11008, 32, 32, 128)


@pytest.mark.parametrize(
    ("preset", "booked", "processed"),
    [("128", 128.8, 146.3), ("64", 65.0, 82.9), ("48", 48.8, 66.7), ("32", 33.0, 51.0)],
)
def test_published_averages_booked_and_processed(
    preset: str, booked: float, processed: float
) -> None:
    counts = count_tokens(576, 32, AdaptInfer.presets[f"llava-1.5-7b/{preset}"])
    assert counts.booked_average == pytest.approx(booked, abs=0.0501)
    assert counts.processed_average == pytest.approx(processed, abs=0.0501)


def test_layer_by_layer() -> None:
    schedule = AdaptInfer.presets["llava-1.5-7b/64"]
    counts = count_tokens(576, 32, schedule)
    assert counts.processed == (576,) * 2 + (133,) * 9 + (27,) * 10 + (3,) * 11
    assert counts.booked == (576,) + (133,) * 9 + (27,) * 10 + (3,) * 12
    assert counts.actual == 576
    assert count_tokens(64, 4).processed == (64,) * 4


@pytest.mark.parametrize("average", [192, 128, 64])
def test_fastv_presets_have_the_average_they_are_named_for(average: int) -> None:
    preset = FastV.presets[f"llava-1.5-7b/{average}"]
    assert preset.counts == (round((32 * average - 1152) / 30),)
    reached = count_tokens(576, 32, preset).processed_average
    assert reached == pytest.approx(average, abs=0.5)
    fitted = fit_average((1,), (1.0,), num_tokens=576, num_layers=32, average=reached)
    assert fitted == preset


def test_other_presets() -> None:
    pyramid = count_tokens(576, 32, PyramidDrop.presets["llava-1.5-7b/270"])
    assert pyramid.processed_average == 270
    assert pyramid.processed[7:9] == (576, 288)
    sparse = count_tokens(576, 32, SparseVLM.presets["llava-1.5-7b/64"])
    assert 79 <= sparse.processed_average <= 82


def test_ratios_of_the_current_count_compound() -> None:
    schedule = AdaptInfer.presets["qwen2-vl-2b/10%"]
    assert schedule.kept(1000) == (170, 102, 31)
    assert schedule.kept(1) == (1, 1, 1)
    assert Schedule((0, 1), ratios=(0.5, 0.25), of="original").kept(100) == (50, 25)


def test_counts_never_rise_and_never_exceed_what_is_there() -> None:
    assert Schedule((1, 2, 3), (50, 80, 10)).kept(60) == (50, 50, 10)
    assert Schedule((1,), (50,)).kept(20) == (20,)


@pytest.mark.parametrize(
    ("schedule", "field"),
    [
        (lambda: Schedule((3, 3), (1, 1)), "schedule.layers"),
        (lambda: Schedule((1, 2), (1,)), "schedule.counts"),
        (lambda: Schedule((1,), (1,), (0.5,)), "schedule"),
        (lambda: Schedule((1,)), "schedule"),
        (lambda: Schedule((1,), (-1,)), "schedule.counts"),
        (lambda: Schedule((1,), ratios=(1.5,)), "schedule.ratios"),
        (lambda: Schedule((1,), ratios=(0.0,)), "schedule.ratios"),
    ],
)
def test_malformed_schedules_are_named(schedule: object, field: str) -> None:
    with pytest.raises(PruningError) as caught:
        schedule()  # type: ignore[operator]
    assert caught.value.field == field


def test_a_schedule_must_fit_the_depth_and_wait_for_deepstack() -> None:
    schedule = Schedule((1, 10, 20), (3, 2, 1))
    schedule.check(22)
    schedule.check(32, last_injection=1)
    for check in (lambda: schedule.check(21), lambda: schedule.check(36, last_injection=2)):
        with pytest.raises(PruningError) as caught:
            check()
        assert caught.value.field == "schedule.layers"
    with pytest.raises(PruningError, match=r"in \[2, 34\]"):
        schedule.check(36, last_injection=2)
    Schedule(()).check(1)


def test_json_round_trip_and_refusals() -> None:
    for schedule in AdaptInfer.presets.values():
        assert Schedule.from_json(schedule.to_json()) == schedule
    for text in ("", "[]", "{}", '{"layers": [1], "counts": [1.5]}', '{"layers": "12", "x": 1}',
                 '{"layers": [1], "counts": [2], "speed": 3}', '{"layers": [1], "counts": [true]}',
                 '{"layers": [1], "ratios": [0.5], "of": "yesterday"}'):  # fmt: skip
        with pytest.raises(PruningError):
            Schedule.from_json(text)


@given(st.integers(20, 600), st.floats(0.0, 1.0), st.booleans())
def test_fitted_schedules_use_the_average_up(tokens: int, place: float, booked: bool) -> None:
    layers, shares, depth = (1, 3, 4), (1.0, 0.5, 0.2), 8
    least = sum(Schedule(layers, (0, 0, 0)).lengths(tokens, depth, booked=booked)) / depth
    average = least + place * (tokens - least)
    fitted = fit_average(layers, shares, num_tokens=tokens, num_layers=depth,
                         average=average, booked=booked)  # fmt: skip
    reached = sum(fitted.lengths(tokens, depth, booked=booked)) / depth
    # one more step of the scale would add at most one token to every layer
    assert reached <= average < reached + 1 or fitted.counts == (tokens,) * 3


def test_an_average_below_what_the_first_layers_cost_is_refused() -> None:
    with pytest.raises(PruningError) as caught:
        fit_average((1,), (1.0,), num_tokens=576, num_layers=32, average=30.0)
    assert caught.value.field == "average" and "36.0" in caught.value.allowed


@pytest.mark.parametrize(("tokens", "tera_macs"), [(576, 3.82), (2880, 20.8), (320, 2.10)])
def test_prefill_work_of_llava_7b(tokens: int, tera_macs: float) -> None:
    assert prefill_macs(LLAVA_7B, [tokens] * 32) / 1e12 == pytest.approx(tera_macs, rel=5e-3)


def test_prefill_work_counts_the_matrices_of_a_layer() -> None:
    shape = DecoderShape(1, 12, 40, 6, 2, 2)
    query, key, up = torch.empty(12, 12), torch.empty(4, 12), torch.empty(40, 12)
    dense = 2 * query.numel() + 2 * key.numel() + 3 * up.numel()
    assert prefill_macs(shape, [5]) == 5 * dense + 2 * 5 * 5 * 12
    ungated = DecoderShape(1, 12, 40, 6, 2, 2, gated=False)
    assert prefill_macs(shape, [5]) - prefill_macs(ungated, [5]) == 5 * up.numel()
    assert prefill_macs(shape, [5, 3]) == prefill_macs(shape, [5]) + prefill_macs(shape, [3])


def test_kv_bytes_of_llava_7b() -> None:
    mebi = 2**20
    assert kv_bytes(LLAVA_7B, [1] * 32) == mebi // 2
    assert kv_bytes(LLAVA_7B, [576] * 32) == 288 * mebi
    for preset, size in (("128", 73), ("64", 41)):
        counts = count_tokens(576, 32, AdaptInfer.presets[f"llava-1.5-7b/{preset}"])
        assert kv_bytes(LLAVA_7B, counts.processed) / mebi == pytest.approx(size, abs=0.5)


def test_fit_like_keeps_places_and_proportions():
    layers = Schedule((0, 1), ratios=(0.4, 0.1), of="original")
    found = fit_like(layers, num_tokens=400, num_layers=4, average=160)
    first, second = found.kept(400)
    assert found.layers == (0, 1)
    assert first == pytest.approx(4 * second, abs=2)
    assert (400 + first + 2 * second) / 4 == pytest.approx(160, abs=1)
