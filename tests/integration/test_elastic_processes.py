"""`epd serve --elastic` with real processes: the shift moves workers, and every answer is right."""

import itertools

import pytest

from epd.demo.examples import SINGLE_TYPES, held_out_example
from epd_services.bench_load import Picture
from epd_services.bench_reference import expected_answers
from epd_services.elastic.experiment import Plan, run_once


@pytest.mark.slow
def test_the_shift_moves_encoders_to_decode_and_no_answer_changes() -> None:
    plan = Plan(long=40, many=160, pictures=8)
    kinds = itertools.cycle(SINGLE_TYPES)
    examples = [held_out_example(n, 0, kind=next(kinds)) for n in range(plan.pictures)]
    pictures = [Picture.of(example.question, example.images[0]) for example in examples]
    expected = expected_answers(pictures, plan.many, lambda done, what: None)
    row = run_once(plan, pictures, expected, elastic=True)
    assert (row["lost"], row["wrong"], row["errors"]) == (0, 0, 0)
    assert row["switches"] >= 1
    assert row["most_per_worker"] == 1
    assert "decode is the bottleneck" in row["why"]
    assert row["last_split"] in {"2E1P2D", "1E1P3D"}
