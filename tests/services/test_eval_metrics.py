"""Scores against hand cases, and budgets against their closed form."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from epd.errors import ConfigError
from epd_pruning.accounting import DecoderShape
from epd_pruning.errors import PruningError
from epd_pruning.registry import layer_pruner
from epd_pruning.schedule import Schedule
from epd_services.evaluation.answering import Answers
from epd_services.evaluation.costs import Prompt, average_costs
from epd_services.evaluation.journal import Cell, Tokens
from epd_services.evaluation.methods import ALL_METHODS, parse_budgets, parse_methods
from epd_services.evaluation.metrics import (
    accuracy_by_type,
    fails_text,
    score,
    text_accuracy,
)
from epd_services.evaluation.questions import matches
from epd_services.evaluation.table import Result, rows, unfit

SHAPE = DecoderShape(
    num_layers=4, hidden_size=8, intermediate_size=16, num_heads=2, num_kv_heads=1, head_dim=4
)


def test_score_counts_flips_and_relates_to_the_dense_run() -> None:
    dense = [True, True, True, True, False]
    right = [True, False, True, False, True]
    found = score(right, dense, ["a", "a", "b", "b", "b"], seed=0)
    assert (found.lost, found.won) == (2, 1)
    assert found.exact == pytest.approx(3 / 5)
    assert found.relative == pytest.approx(3 / 4)
    assert found.by_type == {"a": 0.5, "b": pytest.approx(2 / 3)}


def test_interval_is_that_of_pairs_drawn_again() -> None:
    generator = np.random.default_rng(5)
    dense = (generator.random(400) < 0.9).tolist()
    right = [hit and generator.random() < 0.8 for hit in dense]
    found = score(right, dense, ["a"] * 400, seed=3)
    # delta method: right is dense·coin, so the ratio is a binomial share of the dense hits
    spread = (found.relative * (1 - found.relative) / sum(dense)) ** 0.5
    assert found.low == pytest.approx(found.relative - 1.96 * spread, abs=0.01)
    assert found.high == pytest.approx(found.relative + 1.96 * spread, abs=0.01)
    assert score(right, dense, ["a"] * 400, seed=3) == found
    assert score(right, dense, ["a"] * 400, seed=4).low != found.low


def test_interval_of_equal_runs_is_a_point() -> None:
    hits = [True, False, True, True]
    found = score(hits, hits, ["a"] * 4, seed=0)
    assert (found.low, found.relative, found.high) == (1.0, 1.0, 1.0)


def test_accuracy_by_type_keeps_order_and_text_types_gate() -> None:
    types = ["shape", "text", "ocr_page", "shape"]
    right = [True, False, True, False]
    assert accuracy_by_type(right, types) == {"shape": 0.5, "text": 0.0, "ocr_page": 1.0}
    assert text_accuracy(right, types) == 0.5
    assert text_accuracy(right[:1], types[:1]) is None
    assert fails_text(0.5, 0.6) is True
    assert fails_text(0.6, 0.6) is False
    assert fails_text(None, 0.6) is None
    assert fails_text(0.5, None) is None


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [(" Red.", "red", True), ("a  b", "a b", True), ("5S0", "5S", False), ("", "no", False)],
)
def test_matches_up_to_case_space_and_full_stop(text: str, answer: str, same: bool) -> None:
    assert matches(text, answer) is same


def test_seconds_are_those_of_the_median_wave() -> None:
    waves = [{"prefill": 0.1, "decode": 1.0}, {"prefill": 9.0, "decode": 0.5}, {"prefill": 0.3}]
    assert Answers(waves=waves).seconds == {"prefill": 0.3, "decode": 0.5}


def cell(method: str, budget: float, right: str) -> Cell:
    tokens = Tokens(full=8, actual=4, processed=[4, 2], booked=[2, 2])
    return Cell(
        method=method, budget=budget, fingerprint="f", right=right,
        seconds={"encoder": 0.1, "selector": 0.2, "prefill": 0.3, "decode": 0.4}, tokens=tokens,
        decoder_macs=100.0, selector_macs=10.0, kv_bytes=64.0,
    )  # fmt: skip


def test_rows_flag_what_reads_worse_than_random() -> None:
    types = ["text", "text", "shape", "shape"]
    result = Result(
        dense=cell("none", 1.0, "1111"),
        cells=[cell("random", 0.5, "1000"), cell("blind", 0.5, "0011"), cell("good", 0.5, "1101"),
               cell("blind", 0.25, "0011")],
        missing={("late", 0.5): "at least 6 tokens"}, types=types, seed=0,
    )  # fmt: skip
    made = {(row["method"], row["budget"]): row for row in rows(result)}
    assert made["blind", 0.5]["gate"] == "fails text"
    assert made["good", 0.5]["gate"] == "reads"
    assert made["random", 0.5]["gate"] == made["none", 1.0]["gate"] == ""
    assert made["blind", 0.25]["gate"] == ""  # nothing random was measured there
    assert made["late", 0.5]["note"] == "out of reach: at least 6 tokens"
    assert unfit(rows(result)) == ["blind"]
    assert made["good", 0.5]["end_to_end_ms"] == pytest.approx(1000)
    assert made["good", 0.5]["macs"] == 110
    assert made["good", 0.5]["processed_share"] == pytest.approx(3 / 8)
    assert [row["budget"] for row in rows(result)] == [1.0, 0.5, 0.5, 0.5, 0.5, 0.25]


CONTROLS = ("random", "uniform_stride", "low_resolution")


def test_a_table_of_all_methods_has_every_control() -> None:
    assert set(CONTROLS) <= {method.name for method in parse_methods("all")}


def test_the_published_table_has_every_control_and_script_reads_better_than_random() -> None:
    with (Path(__file__).parents[2] / "docs/eval/scenes.csv").open(newline="") as file:
        gates = {(r["method"], float(r["budget"])): r["gate"] for r in csv.DictReader(file)}
    budgets = {budget for _, budget in gates if budget < 1}
    assert len(budgets) == 3
    assert {(name, budget) for name in CONTROLS for budget in budgets} <= gates.keys()
    assert [gates["script", budget] for budget in budgets] == ["reads"] * 3
    assert "fails text" in gates.values()


def test_methods_are_parsed_with_their_parameters() -> None:
    one, two = parse_methods("script[tau=0.5,combine=released], dpp+adaptinfer[layers=[0,2]],none")
    assert (one.token, one.layer, one.token_params) == (
        "script", None, {"tau": 0.5, "combine": "released"})  # fmt: skip
    assert (two.token, two.layer, two.layer_params) == ("dpp", "adaptinfer", {"layers": [0, 2]})
    assert [method.name for method in parse_methods("all,random")] == list(ALL_METHODS)
    assert one.fingerprint() != parse_methods("script")[0].fingerprint()
    assert two.fingerprint("a") != two.fingerprint("b")


@pytest.mark.parametrize(
    "text",
    ["", "none", "nothing", "script+dpp", "fastv+adaptinfer", "fastv+script", "script[tau]",
     "script[tau=0.5", "script[wrong=1]", "script[tau=[1]]"],
)  # fmt: skip
def test_methods_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Cannot evaluate"):
        parse_methods(text)


def test_budgets_are_shares_in_falling_order() -> None:
    assert parse_budgets("0.11, .25,0.11") == [0.25, 0.11]
    for text in ("", "0", "1", "0.2,x", "-0.1"):
        with pytest.raises(ConfigError):
            parse_budgets(text)


@pytest.mark.parametrize("name", ["random", "script"])
def test_token_methods_let_in_what_they_are_allowed(name: str) -> None:
    (method,) = parse_methods(name)
    costs = average_costs([Prompt((256, 256), 20, 12)], SHAPE, method, 0.11)
    assert costs.tokens.full == 512
    assert costs.tokens.actual == 2 * round(0.11 * 256)
    assert costs.tokens.processed == costs.tokens.booked == [56.0] * 4


def test_layer_methods_process_the_budget_on_average() -> None:
    (method,) = parse_methods("fastv")
    pruner = layer_pruner("fastv", Schedule((0,), (10,)))
    costs = average_costs([Prompt((256,), 20, 12)], SHAPE, method, 0.5, layer_pruner=pruner)
    # one layer of 256 and three of k: the largest k with (256 + 3k) / 4 at most 128
    assert costs.tokens.processed == [256, 85, 85, 85]
    assert costs.tokens.booked == [85] * 4
    assert costs.tokens.processed_average <= 128
    assert costs.selector_macs == 2 * 4 * 256
    assert costs.kv_bytes == 2 * 1 * 4 * 2 * (256 + 3 * 85 + 4 * 20)
    with pytest.raises(PruningError):
        average_costs([Prompt((256,), 20, 12)], SHAPE, method, 0.2, layer_pruner=pruner)


def test_joined_methods_let_twice_the_budget_in() -> None:
    (method,) = parse_methods("dpp+fastv")
    pruner = layer_pruner("fastv", Schedule((0,), (10,)))
    costs = average_costs([Prompt((256,), 20, 12)], SHAPE, method, 0.11, layer_pruner=pruner)
    assert costs.tokens.actual == 56
    assert costs.tokens.processed == [56, 18, 18, 18]
    assert costs.tokens.processed_average <= 28


def test_a_budget_of_all_tokens_prunes_no_layer() -> None:
    (method,) = parse_methods("fastv")
    pruner = layer_pruner("fastv", Schedule((0,), (10,)))
    costs = average_costs([Prompt((256,), 20, 12)], SHAPE, method, 1.0, layer_pruner=pruner)
    assert costs.tokens.processed == [256] * 4
