"""The tables of the elastic controller: what their columns say."""

from dataclasses import replace
from pathlib import Path

import pytest

from epd_services.client import Reply
from epd_services.elastic.experiment import Answer, Plan, summary
from epd_services.elastic.report import Scenario, compare, scenarios, sustainable_rate
from epd_services.elastic.simulation.service_times import CPU, H200
from epd_services.elastic.simulation.traces import shift


def test_the_rate_is_a_share_of_what_the_best_split_sustains() -> None:
    # decode is the dearest by far: one encoder, one prefill worker, six decode workers
    full_step = (CPU.decode_base + 64 * CPU.decode_per_sequence) / 64
    assert sustainable_rate(CPU, share=1.0) == pytest.approx(6 / (500 * full_step))
    assert sustainable_rate(CPU) == pytest.approx(0.8 * sustainable_rate(CPU, share=1.0))
    # there six decode workers outrun the one encoder that is left
    assert sustainable_rate(H200, share=1.0) == pytest.approx(1 / H200.encode_per_image)


def test_a_scenario_has_a_row_per_policy_and_gains_are_against_static() -> None:
    rows = compare(Scenario("small", replace(CPU, name="x"), shift(6.0, short=5, long=25)))
    assert [row["policy"] for row in rows] == [
        "static", "released rule", "elastic", "best static split"
    ]  # fmt: skip
    static = rows[0]
    assert (static["latency_gain"], static["tpot_gain"], static["switches"]) == (1.0, 1.0, 0)
    for row in rows:
        assert row["latency_gain"] == pytest.approx(static["latency_s"] / row["latency_s"])
        assert row["tpot_gain"] == pytest.approx(static["tpot_ms"] / row["tpot_ms"])
        assert row["requests"] == 30
        assert (row["times"], row["split"]) == ("x", "5E1P2D")
    assert rows[3]["latency_s"] <= min(rows[0]["latency_s"], rows[1]["latency_s"])
    assert bool(rows[2]["why"]) == bool(rows[2]["switches"])


def test_the_table_holds_the_published_shift_and_every_shape() -> None:
    names = [scenario.name for scenario in scenarios()]
    assert set(names) == {"shift", "square", "ramp", "burst", "noise"}
    first = scenarios()[0].trace
    assert [a.tokens for a in first.arrivals] == [50] * 10 + [500] * 90
    gaps = {round(b.at - a.at, 9) for a, b in zip(first.arrivals, first.arrivals[1:], strict=False)}
    assert len(gaps) == 1


def test_the_committed_table_meets_the_bars() -> None:
    import csv

    path = Path(__file__).parents[2] / "docs/bench/elastic.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    elastic = [row for row in rows if row["policy"] == "elastic"]
    assert len(elastic) == len(scenarios())
    assert float(elastic[0]["latency_gain"]) >= 2.2
    assert float(elastic[0]["tpot_gain"]) >= 2.4
    for row in elastic:
        assert int(row["most_per_worker"]) <= max(1, int(row["shifts"]))
        assert row["switched_back"] == "0"


def test_the_summary_of_real_answers() -> None:
    good = Reply(status=200, finish_reason="length", ttft=0.5, tpot=0.01, total=2.0)
    lost, refused = Reply(error="gone"), Reply(status=503, code="unavailable", error="no")
    history = [
        {"worker": "e0", "state": "done", "phases": {"total": 0.5}, "reason": "elastic: a"},
        {"worker": "e1", "state": "failed", "phases": {"total": 9.0}, "reason": "elastic: a"},
    ]
    answers = [
        Answer(good, 0.1, True), Answer(good, 0.3, False),
        Answer(lost, 0.0, False), Answer(refused, 0.0, False),
    ]  # fmt: skip
    row = summary(answers, 10.0, history=history, topology="1E1P2D")
    assert row["latency_s"] == pytest.approx(2.2)
    assert row["ttft_s"] == pytest.approx(0.7)
    assert row["tpot_ms"] == pytest.approx(10.0)
    assert (row["lost"], row["wrong"], row["errors"]) == (1, 1, 1)
    assert (row["switches"], row["switch_seconds"], row["why"]) == (1, 0.5, "elastic: a")


def test_the_plan_asks_short_answers_first() -> None:
    plan = Plan(short=2, few=3, long=1, many=9)
    assert plan.asks() == [3, 3, 9]
