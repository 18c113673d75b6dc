"""Numbers into tables: percentiles against their definition, CSV and Markdown read back."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd_services.bench_rows import asked_on, machine, markdown, percentile, write_csv


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.1, 100))
def test_percentile_is_the_smallest_that_covers_enough(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    need = percent / 100 * len(values)
    assert found in values
    assert sum(v <= found for v in values) >= need - 1e-9
    smaller = [v for v in values if v < found]
    if smaller:
        assert sum(v <= max(smaller) for v in values) < need


def test_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 50))


def test_csv_has_every_column_and_value(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    write_csv(path, [{"a": 1, "b": 2.5}, {"a": "x, y", "c": math.nan}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"a": "1", "b": "2.5", "c": ""}, {"a": "x, y", "b": "", "c": ""}]


def test_markdown_aligns_numbers_to_the_right() -> None:
    table = markdown([{"n": "a", "v": 1.5, "z": 0}, {"n": "bcd", "v": 100.25, "z": ""}],
                     {"n": "name", "v": "value", "z": "z"})  # fmt: skip
    assert table.splitlines() == [
        "| name | value | z |",
        "|------|------:|--:|",
        "| a    |   1.5 | 0 |",
        "| bcd  | 100.2 |   |",
    ]


def test_machine_says_with_what_it_ran() -> None:
    facts = machine(command="epd bench")
    assert facts["command"] == "epd bench"
    assert facts["torch"].startswith(("2.", "3."))
    assert "cores" in facts["device"]


@pytest.mark.gpu
def test_machine_names_the_gpu() -> None:
    assert machine(command="x", device="cuda")["cuda"]


def test_a_command_says_the_device_and_dtype_it_was_given() -> None:
    assert asked_on(None, None) == ""
    assert asked_on("cuda", None) == " --device cuda"
    assert asked_on("cpu", "float32") == " --device cpu --dtype float32"


def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert machine(command="x", device="auto")["device"] == machine(command="x")["device"]
