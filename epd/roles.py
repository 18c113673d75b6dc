"""Stages, stage sets and topologies: `1E1P1D`, `2E1PD`, `1EPD`."""

from __future__ import annotations

import re
from enum import Enum

from epd.errors import ConfigError

__all__ = [
    "Stage",
    "StageSet",
    "format_stages",
    "format_topology",
    "parse_stages",
    "parse_topology",
]


class Stage(Enum):
    """One stage of the pipeline; the value is its letter in a topology."""

    ENCODE = "E"
    PREFILL = "P"
    DECODE = "D"


StageSet = frozenset[Stage]

_ORDER = "EPD"
_MAX_WORKERS = 64


def parse_stages(text: str) -> StageSet:
    """The stage set of letters such as `PD`.

    Raises `ConfigError` on unknown or repeated letters.
    """
    letters = text.strip().upper()
    if not letters or any(c not in _ORDER for c in letters) or len(set(letters)) != len(letters):
        raise ConfigError(f"stages must be distinct letters out of E, P and D, not {text[:32]!r}")
    return frozenset(Stage(c) for c in letters)


def format_stages(stages: StageSet) -> str:
    """The letters of a stage set in pipeline order: `PD`."""
    return "".join(c for c in _ORDER if Stage(c) in stages)


def parse_topology(text: str) -> list[StageSet]:
    """One stage set per worker, in the order written: `2E1PD` gives [E, E, PD].

    Raises `ConfigError` when the text is no topology or leaves a stage without a worker.
    """
    compact = text.strip().upper()
    if not re.fullmatch(r"(?:[1-9]\d?[EPD]{1,3})+", compact):
        raise ConfigError(f"{text[:32]!r} is not a topology; write it like 1E1P1D, 2E1PD or 1EPD")
    workers = [
        parse_stages(letters)
        for count, letters in re.findall(r"(\d+)([EPD]+)", compact)
        for _ in range(int(count))
    ]
    missing = set(Stage) - set().union(*workers)
    if missing:
        raise ConfigError(
            f"topology {compact} has no worker for {format_stages(frozenset(missing))}"
        )
    if len(workers) > _MAX_WORKERS:
        raise ConfigError(
            f"topology {compact} has {len(workers)} workers; the limit is {_MAX_WORKERS}"
        )
    return workers


def format_topology(workers: list[StageSet]) -> str:
    """The canonical text of a list of stage sets, equal neighbours counted together."""
    parts: list[tuple[int, str]] = []
    for letters in map(format_stages, workers):
        if parts and parts[-1][1] == letters:
            parts[-1] = (parts[-1][0] + 1, letters)
        else:
            parts.append((1, letters))
    return "".join(f"{count}{letters}" for count, letters in parts)
