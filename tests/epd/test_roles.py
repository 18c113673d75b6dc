"""Topologies and stage sets, as an operator writes them."""

import pytest

from epd.errors import ConfigError
from epd.roles import Stage, format_stages, format_topology, parse_stages, parse_topology

E, P, D = Stage.ENCODE, Stage.PREFILL, Stage.DECODE


@pytest.mark.parametrize(
    ("text", "workers"),
    [
        ("1E1P1D", [{E}, {P}, {D}]),
        ("2E1P2D", [{E}, {E}, {P}, {D}, {D}]),
        ("1e1pd", [{E}, {P, D}]),
        ("1EPD", [{E, P, D}]),
        ("1E1EPD", [{E}, {E, P, D}]),
    ],
)
def test_topologies_are_read_and_written_back(text: str, workers: list[set[Stage]]) -> None:
    parsed = parse_topology(text)
    assert parsed == workers
    assert format_topology(parsed) == text.upper()


@pytest.mark.parametrize(
    "text", ["", "EPD", "1E", "1E1P", "0E1P1D", "1EE1P1D", "1X1P1D", "1E1P1D;rm", "99EPD", "1E-1PD"]
)
def test_what_is_no_topology_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_topology(text)


def test_stage_sets_keep_pipeline_order() -> None:
    assert format_stages(parse_stages("dp")) == "PD"
    with pytest.raises(ConfigError):
        parse_stages("PP")
